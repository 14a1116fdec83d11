"""Computes DoRA's weight norms once per step instead of in every forward pass of every mini-batch.

DoRA divides by the norm of each row of W + s B A (arXiv 2402.09353, section 4.3, which detaches the norm). PEFT
multiplies B A by an identity matrix and computes the norm in every forward pass. Weights do not change within a step,
so the norm can be reused for all mini-batches, with bit-identical results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlm2vec.training.trainer_internals import PEFT_METHODS, dora_layers


@contextmanager
def norms_once(model: nn.Module) -> Iterator[None]:
    """Context manager for a step in which each DoRA layer computes its norm only in its first forward pass."""
    layers = dora_layers(model)
    for layer in layers:
        _remember(layer)
    try:
        yield
    finally:
        for layer in layers:
            for name in PEFT_METHODS:
                object.__delattr__(layer, name)


def _remember(layer: Any) -> None:
    """Replaces two functions of the layer by versions that compute the norm once."""
    get_lora_weight, get_weight_norm = layer.get_lora_weight, layer.get_weight_norm
    norm: torch.Tensor | None = None

    def lora_weight(lora_A: nn.Module, lora_B: nn.Module, adapter_name: str | None = None) -> Any:
        if norm is not None:
            return lora_A.weight  # only the norm uses it
        return get_lora_weight(lora_A=lora_A, lora_B=lora_B, adapter_name=adapter_name)

    def weight_norm(weight: torch.Tensor, **rest: Any) -> torch.Tensor:
        nonlocal norm
        if norm is None:
            norm = get_weight_norm(weight=weight, **rest).detach()
        return norm

    object.__setattr__(layer, "get_lora_weight", lora_weight)
    object.__setattr__(layer, "get_weight_norm", weight_norm)
