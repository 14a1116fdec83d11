"""Vectors in fewer bits; each precision means the same as in `quantize_embeddings` of sentence-transformers.

Shapes: N vectors, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm2vec.errors import UserError, shown

PRECISIONS = ("float32", "float16", "int8", "uint8", "binary", "ubinary")
LEVELS = 255


def check_precision(precision: str) -> None:
    """Checks the name of a precision.

    Raises:
        UserError: for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {shown(precision)}: expected one of {', '.join(PRECISIONS)}")


def width(embedding_dim: int, precision: str) -> int:
    """Length of a vector in this precision; the binary ones pack eight dimensions into a byte."""
    return (embedding_dim + 7) // 8 if precision.endswith("binary") else embedding_dim


def dtype(precision: str) -> np.dtype[Any]:
    """The element type of vectors in this precision."""
    return np.dtype({"binary": "int8", "ubinary": "uint8"}.get(precision, precision))


def ranges_of(vectors_ND: np.ndarray) -> np.ndarray:
    """Smallest and largest value of each dimension, [2, D]: the range that int8 and uint8 divide into 255 steps.

    Raises:
        UserError: for fewer than two vectors.
    """
    if len(vectors_ND) < 2:
        raise UserError("int8 and uint8 compute the range of each dimension from at least two vectors; pass ranges=")
    return np.stack([vectors_ND.min(axis=0), vectors_ND.max(axis=0)])


def quantize(vectors_ND: np.ndarray, precision: str, ranges: np.ndarray | None = None) -> np.ndarray:
    """Converts vectors to a precision.

    Args:
        vectors_ND: float32.
        precision: "float32", "float16"; "int8", "uint8": 255 steps between a dimension's smallest and largest value;
            "binary", "ubinary": one bit a dimension (above 0), packed, as int8 or uint8.
        ranges: These values, [2, D], from a sample of the corpus; None: from these vectors. Vectors that are compared
            must share the same ranges.

    Raises:
        UserError: for an unknown precision, or ranges of a wrong shape, with NaN, or with the largest value first.
    """
    check_precision(precision)
    if precision.startswith("float"):
        return vectors_ND.astype(precision, copy=False)
    if precision.endswith("binary"):
        bits: np.ndarray = np.packbits(vectors_ND > 0, axis=-1)
        return bits if precision == "ubinary" else (bits - np.uint8(128)).view(np.int8)
    if ranges is None:
        ranges = ranges_of(vectors_ND)
    if ranges.shape != (2, vectors_ND.shape[1]):
        raise UserError(f"ranges of shape {ranges.shape}: expected (2, {vectors_ND.shape[1]})")
    lowest, highest = ranges.astype(np.float32, copy=False)
    if not (np.isfinite(ranges).all() and (lowest <= highest).all()):
        raise UserError("ranges: expected finite values, the smallest of each dimension first; use ranges_of")
    steps = (highest - lowest) / LEVELS
    levels: np.ndarray = np.clip(np.floor((vectors_ND - lowest) / np.where(steps == 0, 1, steps)), 0, LEVELS)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)


def quantize_rows(
    vectors_ND: np.ndarray, precision: str, ranges: np.ndarray | None, bad: Sequence[int] = ()
) -> np.ndarray:
    """As `quantize`, but the rows at `bad`, which have no vector, become zeros; no rows give an empty array."""
    if not len(vectors_ND):
        return np.zeros((0, width(vectors_ND.shape[1], precision)), dtype(precision))
    quantized = quantize(vectors_ND, precision, ranges)
    quantized[list(bad)] = 0
    return quantized
