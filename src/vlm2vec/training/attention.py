"""Which attention a training step computes with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.models.backbones.base import Backbone

SHORT = 128
"""Tokens a row up to which, on a processor and in bfloat16, plain products are faster forward and backward than torch's
fused kernel: measured with 9 heads of 64, 1.6 against 8.1 ms at 16 x 16 tokens, 19 against 30 at 8 x 128; at 4 x 256
they are level, and in float32 everywhere."""


def check_kernel(kernel: str, device: torch.device) -> None:
    """Checks `model.attention_kernel` before a model is loaded.

    Raises:
        UserError: for flash_attention_2 on a CPU or without the package flash-attn.
    """
    if kernel != "flash_attention_2":
        return
    if device.type != "cuda":
        raise UserError(f"model.attention_kernel: flash_attention_2 needs a GPU; choose auto on {device.type}")
    if find_spec("flash_attn") is None:
        raise UserError(
            "model.attention_kernel: flash_attention_2 needs the package flash-attn; install it, or choose auto"
        )


def use_kernel(backbone: Backbone, kernel: str) -> None:
    """Makes all attention of a model use one of transformers' implementations; "auto" keeps the model's own choice.

    Args:
        backbone: The model, before adapters wrap it.
        kernel: As `model.attention_kernel` of a recipe.

    Raises:
        UserError: for a family that is not one of transformers' networks, or that does not support the kernel.
    """
    if kernel == "auto":
        return
    choose = getattr(backbone.model, "set_attn_implementation", None)
    if choose is None:
        raise UserError(f"model.attention_kernel: {backbone.name} has one attention only; choose auto")
    try:
        choose(kernel)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.attention_kernel: {backbone.name} does not support {kernel} ({reason}); choose auto"
        ) from error


def attention_for(batch: Batch, device: torch.device, in_half: bool) -> AbstractContextManager[object]:
    """Around a whole step: the faster way of computing the same attention.

    The ways round differently, so both passes of gradient caching take one, and so do activations that are computed
    again in a backward pass.

    Args:
        batch: Everything that the step encodes; one long row decides for all.
        device: Of the model.
        in_half: It computes in bfloat16.
    """
    is_fused_slow = in_half and device.type == "cpu" and max(batch.lengths()) <= SHORT
    plain: AbstractContextManager[object] = sdpa_kernel(SDPBackend.MATH) if is_fused_slow else nullcontext()
    return plain
