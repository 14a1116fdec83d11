"""Matrix products in a low precision, with a bound on their error, that leave few pairs to score exactly.

Shapes: B queries, M candidates of a block, D embedding dim.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Rounded(NamedTuple):
    """Vectors [N, D] in a precision, the norm of each one's rounding error, and the norm of each vector."""

    vectors: torch.Tensor
    errors: np.ndarray
    norms: np.ndarray


def native_precision(num_scores: int) -> torch.dtype:
    """Precision of the products: bfloat16 where the CPU computes in it; it pays off for large blocks only."""
    has = torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16")
    return torch.bfloat16 if num_scores >= 1 << 20 and has else torch.float32


def rounded(vectors: np.ndarray, precision: torch.dtype) -> Rounded:
    """Vectors of float32 in a precision, float32 or bfloat16."""
    given = torch.from_numpy(vectors)
    norms = torch.linalg.vector_norm(given, dim=1).numpy()
    if precision is torch.float32:
        return Rounded(given, np.zeros(len(vectors), np.float32), norms)
    narrow = given.to(precision)
    errors = np.empty(len(vectors), np.float32)
    bits = narrow.view(torch.int16).numpy().view(np.uint16)  # bfloat16 is the upper half of a float32
    for start in range(0, len(vectors), 256):  # parts that fit the CPU's cache
        kept = (bits[start : start + 256].astype(np.uint32) << 16).view(np.float32)
        lost = vectors[start : start + 256] - kept
        errors[start : start + 256] = np.einsum("nd,nd->n", lost, lost)
    return Rounded(narrow, np.sqrt(errors), norms)


def products(left: Rounded, right: Rounded) -> tuple[torch.Tensor, np.ndarray]:
    """The products [B, M], and how far each of a row is at most from that of the vectors in float32, [B].

    The bound leaves out the rounding of a product's result, for which see `bars`.
    """
    # |q.c - q'.c'| <= |q - q'| |c| + |q'| |c - c'|, plus the rounding of the product's float32 sums.
    longest = right.norms.max()
    margin_B = left.errors * longest + (left.norms + left.errors) * right.errors.max()
    margin_B += 2 * np.finfo(np.float32).eps * left.vectors.shape[1] * left.norms * longest
    return left.vectors @ right.vectors.T, margin_B


def bars(least_B: np.ndarray, margin_B: np.ndarray, precision: torch.dtype) -> torch.Tensor:
    """Bars [B, 1] in a precision that every product reaches whose exact score is at least `least_B`."""
    bar_B = least_B.astype(np.float64) - margin_B
    bar_B = bar_B - 3 * np.abs(bar_B) * torch.finfo(precision).eps
    bar_B = np.nan_to_num(bar_B, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    return torch.from_numpy(bar_B).to(precision).unsqueeze(1)
