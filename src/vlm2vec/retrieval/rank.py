"""Exact ranking by counting. Shapes: Q queries, C candidates, D embedding dim."""

from __future__ import annotations

import numpy as np


def gold_rank(scores_C: np.ndarray, relevant: tuple[int, ...]) -> int:
    """Rank of the best relevant candidate, from 1; every other candidate that ties with it stands before it.

    Counting ties as misses makes a constant model score zero instead of one hundred.

    Args:
        scores_C: Score of each candidate, higher is better, shape [C].
        relevant: Positions of the relevant candidates, at least one.
    """
    golds = list(relevant)
    best = scores_C[golds].max()
    others = np.ones(len(scores_C), dtype=bool)
    others[golds] = False
    # `not <` rather than `>=`: a candidate whose score is not a number is before the gold, too.
    return 1 + int((~(scores_C[others] < best)).sum())


def top_k(scores_C: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k best candidates, best first; equal scores in candidate order."""
    return np.argsort(-scores_C, kind="stable")[:k]
