"""In which precision a run keeps and computes its weights."""

from __future__ import annotations

import torch
from torch import nn

from vlm2vec.models.embedder import best_dtype
from vlm2vec.models.loading import family_of
from vlm2vec.training.config import Recipe


def uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether forward passes compute in bfloat16: as the recipe says, else where the device does natively."""
    return best_dtype(device) is torch.bfloat16 if recipe.train.bf16 is None else recipe.train.bf16


def base_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """How the base's weights are held during training.

    Under adapters they are frozen, so they are held once, in the precision in which they compute. Weights that are
    trained stay in float32, and autocast computes with them in bfloat16: all weights without adapters, and bases with
    modules that are trained in full beside the adapters. FSDP2 shards layers of one precision only, and adapters are
    float32, so sharded bases stay in float32, too.
    """
    in_half = uses_bf16(recipe, device) and recipe.lora is not None and recipe.train.sharding == "none"
    if not in_half or family_of(recipe.model.base, recipe.model.revision).trained_modules:
        return torch.float32
    return torch.bfloat16


def train_in_float32(model: nn.Module) -> None:
    """Keeps everything that is trained in float32: bfloat16 would round small updates away."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
