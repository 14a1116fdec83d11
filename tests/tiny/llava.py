"""Tiny random LLaVA models and their relatives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tiny.parts import TEXT, VISION, Family, packed, processor_config, tokenizer, weights

SIDES = {"height": 28, "width": 28}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
FEATURES = 16  # of an image of 28 x 28 pixels


def build_llava(folder: Path) -> None:
    ids = tokenizer(folder, ["<image>"])
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIDES).save_pretrained(folder)
    processor_config(
        folder,
        processor_class="LlavaProcessor",
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=ids["vocab_size"]),
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=28, patch_size=7),
        image_token_index=ids["<image>"],
        image_seq_length=16,
    )
    weights(folder, config)


def build_llava_next(folder: Path, words: Any = transformers.MistralConfig) -> None:
    ids = tokenizer(folder, ["<image>"])
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=SIDES, image_grid_pinpoints=PINPOINTS
    )
    images.save_pretrained(folder)
    processor_config(
        folder,
        processor_class="LlavaNextProcessor",
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaNextConfig(
        text_config=words(**TEXT, vocab_size=ids["vocab_size"]),
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=28, patch_size=7),
        image_token_index=ids["<image>"],
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
    )
    weights(folder, config)


def build_llava_onevision(folder: Path) -> None:
    ids = tokenizer(folder, ["<image>", "<video>"])
    images = transformers.LlavaOnevisionImageProcessorPil(size=SIDES, image_grid_pinpoints=PINPOINTS)
    images.save_pretrained(folder)
    processor_config(
        folder,
        processor_class="LlavaOnevisionProcessor",
        num_image_tokens=FEATURES,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    config = transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**TEXT, vocab_size=ids["vocab_size"]),
        vision_config=transformers.SiglipVisionConfig(**VISION, image_size=28, patch_size=7),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=PINPOINTS,
    )
    weights(folder, config)


def tiled(output: Any, count: int) -> str:
    """The whole image, then the tiles' rows without the margins, each closed by a newline token."""
    height, width = output["image_sizes"][0].tolist()
    tall, wide = best_grid(height, width)
    rows, columns = 4 * tall, 4 * wide
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
    return "<image>" * (FEATURES + rows * (columns + 1))


def tiled_if_alone(output: Any, count: int) -> str:
    """Of several images each is only seen as a whole, closed by a newline token."""
    return tiled(output, count) if count == 1 else "<image>" * (FEATURES + 1)


def together(processor: Any, images: list[Any]) -> list[dict[str, Any]]:
    """It makes other pixels of several images than of one."""
    output = processor([images], return_tensors="pt") if images else {}
    return [{name: output[name][k : k + 1] for name in ("pixel_values", "image_sizes")} for k in range(len(images))]


def counted(outputs: list[Any]) -> dict[str, Any]:
    return packed(outputs) | ({"batch_num_images": torch.tensor([len(outputs)])} if outputs else {})


def best_grid(height: int, width: int) -> tuple[int, int]:
    """Of the possible sizes, that which keeps most pixels and, of these, wastes least."""

    def worth(size: list[int]) -> tuple[int, int]:
        scale = min(size[1] / width, size[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - size[0] * size[1]

    best = max(PINPOINTS, key=worth)
    return best[0] // 28, best[1] // 28


FAMILIES = {
    "llava": Family(build_llava, lambda output, count: "<image>" * 16),
    "llava_next": Family(build_llava_next, tiled),
    "llava_onevision": Family(build_llava_onevision, tiled_if_alone, together, counted),
}
