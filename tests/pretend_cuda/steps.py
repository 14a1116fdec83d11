"""What runs on pretended GPUs: `python -m pretend_cuda.steps FOLDER…` writes a JSON line. Preload the guard."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pretend_cuda import cuda
from vlm2vec import Embedder, EmbeddingInput
from vlm2vec.data.collate import collate_pairs
from vlm2vec.data.examples import TrainExample
from vlm2vec.media.images import ImageRef
from vlm2vec.models.checkpoints.folder import add_adapter
from vlm2vec.models.device import process_device
from vlm2vec.models.encoding.pipeline import Pipeline
from vlm2vec.models.vision.frozen_vision import FrozenVision
from vlm2vec.training.config import TrainSettings
from vlm2vec.training.loss_settings import LossSettings
from vlm2vec.training.objective import Objective
from vlm2vec.training.step import ContrastiveStep

INPUTS: list[Any] = ["a", "longer text", Image.new("RGB", (60, 50), (9, 200, 90))]


def pairs() -> list[TrainExample]:
    made = []
    for i in range(8):
        image = ImageRef.of(Image.new("RGB", (40 + 9 * i, 50), (30 * i, 255 - 30 * i, 90)))
        query = EmbeddingInput("what " * (i + 1), (image,) if i % 4 else ())
        made.append(TrainExample(query, EmbeddingInput("answer " * (1 + i % 3)), origin=str(i)))
    return made


def prepared(folder: str) -> Embedder:
    torch.manual_seed(0)
    embedder = Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu")
    add_adapter(embedder.backbone, 4, 8, 0.0, None)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(embedder.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return embedder.train()


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.elem if isinstance(tensor, cuda.Pretend) else tensor


def step_of(embedder: Embedder, in_half: bool = False, chunk_size: int = 3) -> tuple[float, dict[str, torch.Tensor]]:
    """One whole contrastive step in several mini-batches, in float32 or in bfloat16 by autocast."""
    device = embedder.device
    step = ContrastiveStep(
        embedder,
        Objective(LossSettings(), 0.1).to(device),
        TrainSettings(steps=1, chunk_size=chunk_size, kept_chunks=1),
        device,
        FrozenVision(embedder.backbone.model),
        lambda: torch.autocast(device.type, torch.bfloat16, enabled=in_half),
        in_half=in_half,
    )
    embedder.zero_grad()
    batch = collate_pairs(embedder.backbone.process, pairs())
    cuda.SYNCHRONIZATIONS.clear()
    result = step.backward(batch, embedder.parameters())
    found = {name: plain(p.grad) for name, p in embedder.named_parameters() if p.grad is not None}
    step.vision.remove()
    return float(plain(result.loss)), found


def seeded(embedder: Embedder) -> int:
    """Synchronizations of a model that asks for a number in each forward pass."""
    hook = embedder.register_forward_hook(lambda module, inputs, output: output * float(output.sum() != 0))
    step_of(embedder)
    hook.remove()
    return sum(number for (_, place), number in cuda.SYNCHRONIZATIONS.items() if Path(__file__).name in place)


def by_place() -> dict[str, int]:
    counted: Counter[str] = Counter()
    for (what, place), number in cuda.SYNCHRONIZATIONS.items():
        counted[f"{place} {what}"] += number
    return dict(counted)


def pageable() -> list[int]:
    """Synchronizations of copies from pageable and from pinned memory."""
    found = []
    for tensor in (torch.ones(3), torch.ones(3).pin_memory()):
        cuda.SYNCHRONIZATIONS.clear()
        tensor.to("cuda", non_blocking=True)
        found.append(sum(cuda.SYNCHRONIZATIONS.values()))
    return found


def mismatch(embedder: Embedder) -> str:
    """What the pretended GPU says of a batch on another device than the model."""
    try:
        embedder(embedder.backbone.process([EmbeddingInput("x")]).to("cuda:0"))
    except RuntimeError as error:
        return str(error)
    return ""


@dataclass
class Reference:
    """What a model does on the CPU."""

    loss: float
    gradients: dict[str, torch.Tensor]
    vectors: np.ndarray


def on_cpu(folder: str) -> Reference:
    embedder = prepared(folder)
    return Reference(*step_of(embedder), embedder.encode(INPUTS))


def on_gpu(embedder: Embedder, expected: Reference, is_second: bool) -> dict[str, Any]:
    """Differences to the CPU, and synchronizations."""
    moved = embedder.to(process_device())
    loss, gradients = step_of(moved)
    step_of(moved, in_half=True, chunk_size=1)
    of_many = by_place()
    step_of(moved, in_half=True)
    seen = by_place()
    moved.encode(INPUTS)  # scale and shift of pixel values are copied once
    cuda.SYNCHRONIZATIONS.clear()
    encoded = moved.encode(INPUTS)
    encode_waits = by_place()
    pairs_of = [(gradients[name], gradient) for name, gradient in expected.gradients.items()]
    return {
        "names": sorted(gradients) == sorted(expected.gradients),
        "loss": abs(loss - expected.loss),
        "gradient": max(float((one - g).abs().max() / g.abs().max().clamp(min=1e-12)) for one, g in pairs_of),
        "cosine": float((encoded * expected.vectors).sum(1).min()),
        "waits": seen,
        "waits of many": of_many,
        "encode waits": encode_waits,
        "mismatch": mismatch(moved) if is_second else "",
        "seeded": seeded(moved),
        "pageable": pageable(),
    }


def main(*folders: str) -> None:
    expected = [on_cpu(folder) for folder in folders]
    found: list[dict[str, Any]] = [{} for _ in folders]
    # Wrapper tensors do not support inference mode.
    Pipeline._vectors = torch.no_grad()(Pipeline._vectors.__wrapped__)  # type: ignore[method-assign, attr-defined]
    for rank, count in ((0, 1), (1, 2)):
        os.environ["LOCAL_RANK"] = str(rank)
        cuda.activate(count)
        for folder, reference, by_device in zip(folders, expected, found, strict=True):
            embedder = prepared(folder)
            with cuda.PretendMode():
                by_device[str(process_device())] = on_gpu(embedder, reference, rank > 0)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
