"""Caps and sampling shares of the training sets."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def capped(rows: Sequence[T], max_rows: int | None, seed: int, name: str) -> list[T]:
    """Returns a random sample of at most `max_rows` rows in their original order; None: all rows.

    Taking the first rows would be biased: sets are often sorted by class or by image.
    """
    if max_rows is None or len(rows) <= max_rows:
        return list(rows)
    chosen = random.Random(f"{seed} cap {name}").sample(range(len(rows)), max_rows)
    return [rows[i] for i in sorted(chosen)]


def set_weights(sizes: Mapping[str, int], given: Mapping[str, float | None], exponent: float) -> dict[str, float]:
    """Returns the sampling weight of each set: the given weight, or size ** exponent. The scale is arbitrary.

    Args:
        sizes: Number of pairs in each set, after caps.
        given: Weights by name; None: use the size.
        exponent: 1: proportional to size; 0: equal weights; values between 0 and 1 sample large sets less often than
            their size implies (a sampling temperature of 1 / exponent).
    """
    weights = {}
    for name, size in sizes.items():
        weight = given.get(name)
        weights[name] = float(size) ** exponent if weight is None else float(weight)
    return weights
