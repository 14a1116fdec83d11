"""Selects the attention implementation of a training step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.models.backbones.base import Backbone

SHORT = 128
"""Maximum number of tokens per row for which plain matrix products are faster than torch's fused kernel on a CPU in
bfloat16. Forward and backward pass with 9 heads of 64 dimensions: 1.6 instead of 8.1 ms for 16 x 16 tokens, 19 instead
of 30 ms for 8 x 128, no difference for 4 x 256. In float32 there is no difference at any length."""


def check_kernel(kernel: str, device: torch.device) -> None:
    """Checks `model.attention_kernel` before a model is loaded.

    Raises:
        UserError: for flash_attention_2 on a CPU or without the package flash-attn.
    """
    if kernel != "flash_attention_2":
        return
    if device.type != "cuda":
        raise UserError(f"model.attention_kernel: flash_attention_2 requires a GPU; choose auto on {device.type}")
    if find_spec("flash_attn") is None:
        raise UserError(
            "model.attention_kernel: flash_attention_2 requires the package flash-attn; install it, or choose auto"
        )


def use_kernel(backbone: Backbone, kernel: str) -> None:
    """Sets the attention implementation of a model; "auto" keeps the model's default.

    Args:
        backbone: The model, before adapters wrap it.
        kernel: Value of `model.attention_kernel` in a recipe.

    Raises:
        UserError: for a family that is not implemented in transformers or does not support the kernel.
    """
    if kernel == "auto":
        return
    choose = getattr(backbone.model, "set_attn_implementation", None)
    if choose is None:
        raise UserError(f"model.attention_kernel: {backbone.name} has only one implementation; choose auto")
    try:
        choose(kernel)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.attention_kernel: {backbone.name} does not support {kernel} ({reason}); choose auto"
        ) from error


def attention_for(batch: Batch, device: torch.device, in_half: bool) -> AbstractContextManager[object]:
    """Returns a context manager for a whole step that selects the faster implementation of the same attention.

    The implementations round differently. The choice therefore applies to the whole step: to both forward passes of
    gradient caching and to activations recomputed in the backward pass.

    Args:
        batch: All inputs of the step; the longest row decides.
        device: Device of the model.
        in_half: Whether the model computes in bfloat16.
    """
    is_fused_slow = in_half and device.type == "cpu" and max(batch.lengths()) <= SHORT
    plain: AbstractContextManager[object] = sdpa_kernel(SDPBackend.MATH) if is_fused_slow else nullcontext()
    return plain
