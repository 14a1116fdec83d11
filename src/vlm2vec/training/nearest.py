"""Hard negatives by vectors: the targets nearest to each query that are not its own.

Queries are taken in blocks, which do not depend on each other, so processes can share them. Every query is compared
with every target: the result is exact, the time grows with N · M · D, and memory does not grow with M. Where the CPU
computes in bfloat16, most pairs are excluded by a product in it, with a bound on its rounding.

Shapes: N queries, M distinct targets, D embedding dim, B queries of a block, K nearest targets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from vlm2vec.retrieval.rank import Rows
from vlm2vec.retrieval.screening import Rounded, bars, native_precision, products, rounded

BLOCK, TARGETS_AT_ONCE = 4096, 2048  # a block of scores is 32 MiB, however many pairs and targets there are
SCORED_AGAIN = 8  # pairs of a query and block for which screening in low precision takes less time


@dataclass(frozen=True)
class MiningRule:
    """Which of the nearest targets become negatives.

    Attributes:
        num: Maximum number of negatives of each pair.
        skip: Number of nearest targets to skip, which are often unlabelled positives.
        max_rank: Maximum rank of a negative; None: any.
        margin: A negative's cosine is at least this far below the positive's; None: no limit.
        judged: Number of nearest candidates of each pair that a judge scores.
        judge_margin: A negative's score by the judge is at least this far below the positive's.
        pick: Which allowed targets are taken if there are more than `num`: the nearest, or `num` at random. Random ones
            are as hard as the candidates of a first stage of `max_rank`, which is what a reranker will see.
    """

    num: int = 1
    skip: int = 0
    max_rank: int | None = 100
    margin: float | None = 0.0
    judged: int = 20
    judge_margin: float = 0.0
    pick: Literal["nearest", "random"] = "nearest"

    def chosen(self, allowed: Sequence[int], query: int) -> list[int]:
        """At most `num` of the allowed targets in their order; random ones depend on the number of the query only."""
        if self.pick == "nearest" or len(allowed) <= self.num:
            return list(allowed[: self.num])
        places = random.Random(query).sample(range(len(allowed)), self.num)
        return [allowed[place] for place in sorted(places)]


class Positives(Protocol):
    """Rows that are no negatives of each query."""

    def __getitem__(self, number: int, /) -> set[int]: ...


@dataclass(frozen=True)
class QueryBlock:
    """Consecutive queries whose negatives are found together.

    Attributes:
        first: Number of the first query.
        own_B: Row of each query's positive.
        positives: All rows that are no negatives of each query.
    """

    first: int
    own_B: np.ndarray
    positives: list[set[int]]

    def numbers(self) -> slice:
        """The queries."""
        return slice(self.first, self.first + len(self.own_B))


def query_blocks(own_N: Sequence[int] | np.ndarray, positives: Positives) -> Iterator[QueryBlock]:
    """All queries in blocks of `BLOCK`; a block is made when it is asked for."""
    for first in range(0, len(own_N), BLOCK):
        own_B = np.asarray(own_N[first : first + BLOCK], np.int64)
        yield QueryBlock(first, own_B, [positives[number] for number in range(first, first + len(own_B))])


def mine_negatives(
    queries_ND: Rows,
    targets_MD: Rows,
    own_N: Sequence[int] | np.ndarray,
    positives: Positives,
    rule: MiningRule,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """For each query, the rows of `targets_MD` that are its hard negatives, nearest first.

    Args:
        queries_ND: Unit-norm query vectors.
        targets_MD: Unit-norm vectors of distinct targets.
        own_N: Row of each query's positive.
        positives: All rows that are no negatives of that query (the positives of every equal query).
        rule: Ranks are counted among targets that are not positives.
        progress: Called with the number of queries done since the last call.
    """
    found: list[list[int]] = []
    for block in query_blocks(own_N, positives):
        found += mine_block(queries_ND[block.numbers()], targets_MD, block, rule)
        progress(len(block.own_B))
    return found


def mine_block(queries_BD: np.ndarray, targets_MD: Rows, block: QueryBlock, rule: MiningRule) -> list[list[int]]:
    """The hard negatives of the queries of a block, as by `mine_negatives`."""
    wanted = rule.skip + rule.num if rule.max_rank is None else max(rule.max_rank, rule.skip)
    queries_BD = queries_BD.astype(np.float32, copy=False)
    limit_B = np.full(len(queries_BD), np.inf, np.float32)
    if rule.margin is not None:
        own_BD = targets_MD[block.own_B].astype(np.float32, copy=False)
        limit_B = np.einsum("bd,bd->b", queries_BD, own_BD) - np.float32(rule.margin)
    # A rank limit counts every target that is not a positive; without it, only targets below the limit compete.
    bar_B = limit_B if rule.max_rank is None else None
    cosines, columns = _nearest(queries_BD, targets_MD, block.positives, bar_B, wanted)
    found = []
    for number, (limit, values, rows) in enumerate(
        zip(limit_B.tolist(), cosines.tolist(), columns.tolist(), strict=True), block.first
    ):
        ranked = list(zip(values, rows, strict=True))[rule.skip :]
        allowed = [row for cosine, row in ranked if -np.inf < cosine <= limit]
        found.append(rule.chosen(allowed, number))
    return found


def _nearest(
    queries_BD: np.ndarray, targets_MD: Rows, positives: Sequence[set[int]], bar_B: np.ndarray | None, wanted: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosines and rows of each query's `wanted` nearest targets that are not positives and not above its bar.

    The targets are scored in blocks and only the best so far are kept, so memory does not grow with M. Positions
    without a target have a cosine of -inf.
    """
    best = _Best(len(queries_BD), wanted)
    precision = native_precision(len(queries_BD) * TARGETS_AT_ONCE)
    queries = rounded(queries_BD, precision)
    skipped = np.array([(b, m) for b, mine in enumerate(positives) for m in mine], np.int64).reshape(-1, 2)
    skipped = skipped[np.argsort(skipped[:, 1], kind="stable")]
    for begin in range(0, len(targets_MD), TARGETS_AT_ONCE):
        block_MD = targets_MD[begin : begin + TARGETS_AT_ONCE].astype(np.float32, copy=False)
        inside = skipped[slice(*np.searchsorted(skipped[:, 1], [begin, begin + len(block_MD)]))] - [0, begin]
        scored = None
        few = begin * SCORED_AGAIN >= wanted * TARGETS_AT_ONCE  # targets of this block that a query is expected to keep
        if precision is not torch.float32 and few and best.is_full():
            scored = _screened(queries, queries_BD, block_MD, inside, best.least_B)
        if scored is None:
            scored = _compared(queries_BD, block_MD, inside, bar_B, best)
        elif bar_B is not None:
            scored = scored.where(scored.cosines <= torch.from_numpy(bar_B)[scored.rows])
        best.add(scored, begin)
    return best.cosines, best.targets


class _Pairs(NamedTuple):
    """Pairs of queries and targets of a block with their cosines, by query."""

    rows: torch.Tensor
    columns: torch.Tensor
    cosines: torch.Tensor

    def where(self, keep: torch.Tensor) -> _Pairs:
        """Some of the pairs."""
        return _Pairs(self.rows[keep], self.columns[keep], self.cosines[keep])


class _Best:
    """The nearest targets of each query so far, nearest first."""

    def __init__(self, num_queries: int, wanted: int) -> None:
        self.cosines = torch.full((num_queries, wanted), -torch.inf)
        self.targets = torch.zeros((num_queries, wanted), dtype=torch.long)

    @property
    def least_B(self) -> torch.Tensor:
        """The cosine that another target must exceed."""
        return self.cosines[:, -1]

    def is_full(self) -> bool:
        """Whether every query has as many targets as are wanted."""
        return bool(self.least_B.isfinite().all())

    def add(self, pairs: _Pairs, begin: int) -> None:
        """Takes pairs of the block that begins with this target; the best of them and of the earlier ones stay."""
        counts = pairs.rows.bincount(minlength=len(self.cosines))
        rows = counts.nonzero().flatten()
        if not len(rows):
            return
        counts = counts[rows]
        row = torch.arange(len(rows)).repeat_interleave(counts)
        place = torch.arange(len(pairs.rows)) - (counts.cumsum(dim=0) - counts)[row]
        values = torch.full((len(rows), int(counts.max())), -torch.inf)
        columns = torch.zeros(values.shape, dtype=torch.long)
        values[row, place], columns[row, place] = pairs.cosines, pairs.columns + begin
        merged = torch.cat([self.cosines[rows], values], dim=1).topk(self.cosines.shape[1], dim=1)
        self.targets[rows] = torch.cat([self.targets[rows], columns], dim=1).gather(1, merged.indices)
        self.cosines[rows] = merged.values


def _compared(
    queries_BD: np.ndarray, block_MD: np.ndarray, inside: np.ndarray, bar_B: np.ndarray | None, best: _Best
) -> _Pairs:
    """The pairs of a block above the least of the nearest so far, at most `wanted` of each query."""
    cosines = torch.from_numpy(queries_BD) @ torch.from_numpy(block_MD).T
    if bar_B is not None:
        cosines[cosines > torch.from_numpy(bar_B)[:, None]] = -torch.inf
    cosines[inside[:, 0], inside[:, 1]] = -torch.inf
    rows = (cosines.amax(dim=1) > best.least_B).nonzero().flatten()  # few after the first blocks
    cosines, wanted = cosines[rows], best.cosines.shape[1]
    above = cosines > best.least_B[rows, None]
    if len(rows) and int(above.sum(dim=1).max()) > wanted:
        found = cosines.topk(wanted, dim=1)
        return _Pairs(rows.repeat_interleave(wanted), found.indices.flatten(), found.values.flatten())
    row, column = above.nonzero(as_tuple=True)
    return _Pairs(rows[row], column, cosines[row, column])


def _screened(
    queries: Rounded, queries_BD: np.ndarray, block_MD: np.ndarray, inside: np.ndarray, least_B: torch.Tensor
) -> _Pairs | None:
    """The pairs of `_compared` by a product in low precision; only those that may be above the least are scored again.

    Returns:
        None if they are too many, so that comparing all in full takes less time.
    """
    precision = queries.vectors.dtype
    scores, margin_B = products(queries, rounded(block_MD, precision))
    scores[inside[:, 0], inside[:, 1]] = -torch.inf
    bar_B1 = bars(least_B.numpy(), margin_B, precision)
    near = (scores.amax(dim=1) >= bar_B1.flatten()).nonzero().flatten()
    row, column = (scores[near] >= bar_B1[near]).nonzero(as_tuple=True)
    if len(row) > 4 * SCORED_AGAIN * len(scores):
        return None
    row = near[row]
    cosines = torch.linalg.vecdot(torch.from_numpy(queries_BD)[row], torch.from_numpy(block_MD)[column])
    return _Pairs(row, column, cosines).where(cosines > least_B[row])
