"""Exact ranking without sorting. Shapes: B queries, M candidates, D embedding dim, K kept scores.

One order everywhere: higher scores first; among equal scores, candidates that are not relevant come before relevant
ones, and less relevant ones before more relevant ones. A model with one vector for all inputs scores 0, not 100.

A score is the float64 dot product, rounded to float32. It does not depend on block sizes, threads or the matrix
library, and neither does a rank. Matrix products (in bfloat16 where the CPU supports it) only select the pairs that
need an exact score, with a bound on their rounding error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from vlm2vec.retrieval.screening import bars, native_precision, products, rounded

BLOCK = 8192
DEPTH = 10
"""Ranks are exact down to this depth: the largest k of the metrics."""
MOST_PAIRS = 64
"""Pairs per query and block that are scored exactly after a bfloat16 product; more are first screened in float32."""


class Rows(Protocol):
    """Vectors [M, D] indexed by slice, list or number: an array, a memory map, or rows of an embedding cache."""

    def __len__(self) -> int:
        """M."""
        ...

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The vectors of these rows."""
        ...


def gold_rank(scores_M: np.ndarray, relevant: Sequence[int]) -> int:
    """Rank of the best relevant candidate, from 1; every other candidate with the same score comes before it.

    Args:
        scores_M: Score of each candidate, higher is better, shape [M].
        relevant: Positions of the relevant candidates, at least one.
    """
    golds = list(relevant)
    best = scores_M[golds].max()
    others = np.ones(len(scores_M), dtype=bool)
    others[golds] = False
    # `not <` rather than `>=`: a candidate with a NaN score also comes before the relevant one.
    return 1 + int((~(scores_M[others] < best)).sum())


def top_k(scores_M: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k best candidates, best first; equal scores in candidate order."""
    return np.argsort(-scores_M, kind="stable")[:k]


def exact_scores(query_D: np.ndarray, rows_MD: np.ndarray) -> np.ndarray:
    """Score of one query (in float64) with each row, shape [M]."""
    return np.asarray(rows_MD.astype(np.float64) @ query_D, dtype=np.float32)


def best_candidates(
    query_D: np.ndarray, candidates_MD: Rows, k: int, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and exact scores of one query's k best candidates, in blocks; equal scores in candidate order."""
    wide_D = query_D.astype(np.float64)
    places, scores = np.empty(0, np.int64), np.empty(0, np.float32)
    for start in range(0, len(candidates_MD), block):
        found = exact_scores(wide_D, np.asarray(candidates_MD[start : start + block]))
        places = np.concatenate([places, np.arange(start, start + len(found))])
        scores = np.concatenate([scores, found])
        best = top_k(scores, k)
        places, scores = places[best], scores[best]
    return places, scores


def rank_relevant(
    queries_BD: np.ndarray,
    candidates_MD: Rows,
    relevant: Sequence[Sequence[int]],
    gains: Sequence[Sequence[float]] | None = None,
    *,
    depth: int = DEPTH,
    block: int = BLOCK,
    screen: torch.dtype | None = None,
) -> list[list[int]]:
    """Rank of every relevant candidate of every query among all candidates, exact down to `depth`.

    The candidates are read in blocks. In each block, only candidates that can be among the first `depth` are scored
    exactly and kept, so memory does not grow with M (which may be a memory map), and nothing is sorted.

    Args:
        queries_BD: Query vectors.
        candidates_MD: Candidate vectors, at least one.
        relevant: For each query, positions of its relevant candidates, at least one.
        gains: Relevance grade of each of them; None: all equal.
        depth: Deepest rank that is exact; ranks below it are returned as `depth + 1`.
        block: Candidates per matrix product.
        screen: Precision of the matrix products; None: bfloat16 where the CPU supports it, else float32.

    Returns:
        For each query the ranks in the order of its `relevant`, from 1.
    """
    first_of, copies = _equal_rows(candidates_MD)
    golds = [[int(first_of[position]) for position in positions] for positions in relevant]
    queries_BD = np.ascontiguousarray(queries_BD, dtype=np.float32)
    wide_BD = queries_BD.astype(np.float64)
    gold_scores = [exact_scores(wide_BD[i], candidates_MD[places]) for i, places in enumerate(golds)]
    best_BK = np.full((len(queries_BD), depth), -np.inf, dtype=np.float32)
    for start in range(0, len(candidates_MD), block):
        part_MD = np.require(candidates_MD[start : start + block], np.float32, ["C", "W"])  # a copy only if needed
        skip = _golds_in(golds, start, start + len(part_MD))
        repeats = None if copies is None else np.minimum(copies[start : start + block], depth)
        precision = screen or native_precision(len(queries_BD) * len(part_MD))
        rows, columns = _survivors(queries_BD, part_MD, best_BK, skip, precision)
        _keep_best(best_BK, wide_BD, part_MD, rows, columns, repeats)
    ranks = []
    for i, positions in enumerate(golds):
        beside = gold_scores[i][_copies_beside(positions, copies, depth)]
        worth = gains[i] if gains else [1.0] * len(positions)
        ranks.append(_ranks(gold_scores[i], worth, np.append(best_BK[i], beside), depth))
    return ranks


def _golds_in(golds: list[list[int]], start: int, stop: int) -> tuple[list[int], list[int]]:
    """(row, column) of the relevant candidates in a block, which are not compared with themselves."""
    found = [(row, p - start) for row, positions in enumerate(golds) for p in positions if start <= p < stop]
    return [row for row, _ in found], [column for _, column in found]


def _survivors(
    queries_BD: np.ndarray,
    part_MD: np.ndarray,
    best_BK: np.ndarray,
    skip: tuple[list[int], list[int]],
    precision: torch.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row, column), by row, of a block whose exact score can be among the K best of the row."""
    scores_BM, margin_B = products(rounded(queries_BD, precision), rounded(part_MD, precision))
    scores_BM[skip] = -torch.inf
    kth_B = best_BK.min(axis=1).astype(np.float64)
    depth = best_BK.shape[1]
    if len(part_MD) > depth:  # the block's own K best are a lower bound, too
        own_B = scores_BM.topk(depth, dim=1).values[:, -1].double().numpy()
        kth_B = np.fmax(kth_B, own_B - np.abs(own_B) * torch.finfo(precision).eps - margin_B)
    bar_B1 = bars(kth_B, margin_B, precision)
    # NaNs survive this filter at the cost of a second pass, so check for them only when present.
    stays_BM = scores_BM >= bar_B1 if np.isfinite(margin_B).all() else ~(scores_BM < bar_B1)
    stays_BM[skip] = False
    rows, columns = np.nonzero(stays_BM.numpy())
    if precision is not torch.float32 and len(rows) > MOST_PAIRS * len(queries_BD):
        return _survivors(queries_BD, part_MD, best_BK, skip, torch.float32)
    return rows, columns


def _keep_best(
    best_BK: np.ndarray,
    wide_BD: np.ndarray,
    part_MD: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    repeats: np.ndarray | None,
) -> None:
    """Scores pairs exactly and merges them into each row's best; a repeated vector counts once per repeat."""
    depth = best_BK.shape[1]
    touched, begins = np.unique(rows, return_index=True)
    for row, mine in zip(touched, np.split(columns, begins[1:]), strict=True) if len(touched) else ():
        scores = exact_scores(wide_BD[row], part_MD[mine])
        scores = np.where(np.isnan(scores), np.inf, scores)  # before every relevant candidate
        if repeats is not None:
            scores = np.repeat(scores, repeats[mine])
        merged = np.concatenate([best_BK[row], scores])
        best_BK[row] = np.partition(merged, len(merged) - depth)[-depth:]


def _equal_rows(rows_MD: Rows) -> tuple[np.ndarray, np.ndarray | None]:
    """For each row, the first row with the same content, and the number of rows with that content (0 for repeats).

    The second value is None if no row repeats. Only rows that agree in their first two values are compared in full.
    """
    first_of = np.arange(len(rows_MD))
    heads = np.concatenate(
        [np.asarray(rows_MD[start : start + BLOCK])[:, :2] for start in range(0, len(rows_MD), BLOCK)]
    ).astype(np.float32)
    bits = np.ascontiguousarray(np.repeat(heads, 2, axis=1) if heads.shape[1] < 2 else heads)
    _, group, size = np.unique(bits.view(np.uint64).ravel(), return_inverse=True, return_counts=True)
    suspects = np.flatnonzero(size[group] > 1)
    seen: dict[bytes, int] = {}
    for row in suspects:
        first_of[row] = seen.setdefault(np.asarray(rows_MD[int(row)]).tobytes(), int(row))
    copies = np.bincount(first_of, minlength=len(rows_MD))
    return first_of, (copies if (copies != 1).any() else None)


def _copies_beside(positions: list[int], copies: np.ndarray | None, depth: int) -> list[int]:
    """Places in `positions`, repeated once per copy of that vector that is not relevant: copies tie with it."""
    if copies is None:
        return []
    beside: list[int] = []
    for place, position in enumerate(positions):
        if positions.index(position) == place:
            beside += [place] * min(depth, int(copies[position]) - positions.count(position))
    return beside


def _ranks(gold_scores: np.ndarray, gains: Sequence[float], others: np.ndarray, depth: int) -> list[int]:
    """Ranks among the best other scores; equal scores and NaNs come before."""
    scores = np.where(np.isnan(gold_scores), -np.inf, gold_scores)
    others = others[~np.isneginf(others)]  # without unused places
    before = [int((~(others < score)).sum()) for score in scores]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], gains[i], i))
    place = {i: position for position, i in enumerate(order)}
    return [min(1 + before[i] + place[i], depth + 1) for i in range(len(scores))]
