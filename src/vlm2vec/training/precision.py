"""Chooses the precision in which a run stores and computes its weights."""

from __future__ import annotations

import torch
from torch import nn

from vlm2vec.models.device import best_dtype
from vlm2vec.models.loading import family_of
from vlm2vec.training.config import Recipe


def uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Returns whether forward passes use bfloat16: from the recipe, or if the device supports it natively."""
    return best_dtype(device) is torch.bfloat16 if recipe.train.bf16 is None else recipe.train.bf16


def base_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Returns the dtype of the base's weights during training.

    With adapters the base is frozen and is stored in the compute precision. Trained weights stay in float32, and
    autocast computes with them in bfloat16; this applies to training without adapters and to bases with modules that
    are fully trained in addition to the adapters. FSDP2 requires the same dtype for all parameters of a layer, and
    adapters are float32, so sharded bases stay in float32, too.
    """
    in_half = uses_bf16(recipe, device) and recipe.lora is not None and recipe.train.sharding == "none"
    if not in_half or family_of(recipe.model.base, recipe.model.revision).trained_modules:
        return torch.float32
    return torch.bfloat16


def train_in_float32(model: nn.Module) -> None:
    """Converts all trained parameters to float32: in bfloat16, small updates would be rounded away."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
