"""One model from several checkpoints of the same base: a weighted mean of their weights, linear or spherical."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vlm2vec.errors import UserError, shown
from vlm2vec.models.checkpoints.folder import merge_adapter, provenance
from vlm2vec.models.embedder import Embedder

COLLINEAR = 1e-4
"""Angle in radians below which `spherical` divides by nearly zero, and equals `linear` to its square."""
Blend = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def linear(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """(1 - share) a + share b. Applied in turn, it gives the weighted mean of any number of models."""
    return torch.lerp(a, b, share)


def spherical(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """Interpolates along the arc between two tensors, each taken as one vector (SLERP, Shoemake 1985)."""
    lengths = a.norm() * b.norm()
    cosine = float((a * b).sum() / lengths) if lengths > 0 else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if angle < COLLINEAR or math.pi - angle < COLLINEAR:
        return linear(a, b, share)
    return (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)


METHODS: dict[str, Blend] = {"linear": linear, "spherical": spherical}


def parse_run(text: str) -> tuple[str, float]:
    """`RUN` or `RUN=WEIGHT` as name and weight; the default weight is 1.

    Raises:
        UserError: if the weight is not a positive number.
    """
    name, found, number = text.rpartition("=")
    if not found or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"{shown(text)}: weight {shown(number)}: expected a positive number, such as {name}=0.5")
    return name, weight


def merge(runs: Sequence[tuple[str, float]], output: Path, method: str = "linear") -> Path:
    """Writes a checkpoint folder whose weights are the mean of several models', in float32.

    Adapters are merged into their base first, so runs with and without LoRA can be combined. Two models are in memory
    at a time. `spherical` combines the first two, then the result with the third, and so on; with three or more models
    the order matters.

    Args:
        runs: Names that `Embedder.from_pretrained` accepts, with weights on any scale.
        output: The new folder.
        method: A key of `METHODS`.

    Returns:
        `output`.

    Raises:
        UserError: for fewer than two runs, an unknown method, an existing folder, or models that differ in more than
            the values of their weights.
    """
    if len(runs) < 2:
        raise UserError(f"merge: found {len(runs)} run; expected at least two")
    if method not in METHODS:
        raise UserError(f"method {shown(method)}: expected one of {', '.join(METHODS)}")
    if output.exists():
        raise UserError(f"{output}: already exists; choose another output or delete it")
    (first, total), *rest = runs
    merged = _load(first)
    for name, weight in rest:
        total += weight
        _blend_into(merged, _load(name), weight / total, METHODS[method], (first, name))
    facts = provenance(method=method, runs=[{"model": name, "weight": weight} for name, weight in runs])
    return merged.save_pretrained(output, extra=[("merge.json", facts)])


def _load(name: str) -> Embedder:
    embedder = Embedder.from_pretrained(name, device="cpu", dtype=torch.float32)
    merge_adapter(embedder.backbone)
    return embedder


@torch.no_grad()
def _blend_into(merged: Embedder, other: Embedder, share: float, blend: Blend, names: tuple[str, str]) -> None:
    """Replaces the weights of `merged` by the blend of both."""
    _check_alike(merged, other, names)
    ours, theirs = merged.backbone.model.state_dict(), other.backbone.model.state_dict()
    done: set[int] = set()  # a tensor with two names (tied embeddings) is blended once
    for name, tensor in ours.items():
        if tensor.is_floating_point() and tensor.numel() and tensor.data_ptr() not in done:
            done.add(tensor.data_ptr())
            tensor.copy_(blend(tensor, theirs[name], share))


def _check_alike(merged: Embedder, other: Embedder, names: tuple[str, str]) -> None:
    """Checks everything that must be equal besides the values of the weights.

    Raises:
        UserError: naming the first difference.
    """
    where = f"{names[1]}: cannot be merged with {names[0]}"
    facts = [
        {
            "family": each.name,
            "pooling": each.pooling,
            "attention": each.attention,
            "template": each.template.settings(),
            "options": each.options(),
        }
        for each in (merged.backbone, other.backbone)
    ]
    for key, value in facts[0].items():
        if value != facts[1][key]:
            raise UserError(f"{where}: {key} is {shown(str(facts[1][key]))}, expected {shown(str(value))}")
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in each.backbone.model.state_dict().items()}
        for each in (merged, other)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        here, there = shapes[0].get(name), shapes[1].get(name)
        if here != there:
            raise UserError(f"{where}: weight {name} has shape {there}, expected {here}; runs need the same base")
