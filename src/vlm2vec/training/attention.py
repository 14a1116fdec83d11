"""Which attention a training step computes with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm2vec.batch import Batch

SHORT = 128
"""Tokens a row up to which, on a processor and in bfloat16, plain products are faster forward and backward than torch's
fused kernel: measured with 9 heads of 64, 1.6 against 8.1 ms at 16 x 16 tokens, 19 against 30 at 8 x 128; at 4 x 256
they are level, and in float32 everywhere."""


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
