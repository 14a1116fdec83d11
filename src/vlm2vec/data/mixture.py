"""How much of each training set goes into a run: caps and shares."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def capped(rows: Sequence[T], max_rows: int | None, seed: int, name: str) -> list[T]:
    """At most `max_rows` of a set's rows, chosen by chance and left in their order; None: all of them.

    The first rows of a set are often of one kind (sorted by class or by image): taking them would not be a sample.
    """
    if max_rows is None or len(rows) <= max_rows:
        return list(rows)
    chosen = random.Random(f"{seed} cap {name}").sample(range(len(rows)), max_rows)
    return [rows[i] for i in sorted(chosen)]


def set_weights(sizes: Mapping[str, int], given: Mapping[str, float | None], exponent: float) -> dict[str, float]:
    """Share of each set in the batches: the given weight, else size ** exponent; a positive scale of its own.

    Args:
        sizes: Pairs of each set, after caps.
        given: Weights by name; None where the size decides.
        exponent: 1: by size; 0: all equal; between them, large sets are drawn less often than their size says (a
            sampling temperature of 1 / exponent).
    """
    weights = {}
    for name, size in sizes.items():
        weight = given.get(name)
        weights[name] = float(size) ** exponent if weight is None else float(weight)
    return weights
