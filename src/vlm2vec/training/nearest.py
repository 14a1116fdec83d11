"""Hard negatives by vectors: the targets nearest to each query that are not its own.

Queries are taken in blocks, which do not depend on each other, so processes can share them. Every query is compared
with every target: the result is exact, the time grows with N · M · D, and memory does not grow with M.

Shapes: N queries, M distinct targets, D embedding dim, B queries of a block, K nearest targets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from vlm2vec.retrieval.rank import Rows

BLOCK, TARGETS_AT_ONCE = 4096, 2048  # a block of scores is 32 MiB, however many pairs and targets there are


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
    queries = torch.from_numpy(queries_BD)
    best = torch.full((len(queries), wanted), -torch.inf)
    best_rows = torch.zeros((len(queries), wanted), dtype=torch.long)
    pairs = np.array([(b, m) for b, mine in enumerate(positives) for m in mine], np.int64).reshape(-1, 2)
    pairs = pairs[np.argsort(pairs[:, 1], kind="stable")]
    for begin in range(0, len(targets_MD), TARGETS_AT_ONCE):
        block = torch.from_numpy(targets_MD[begin : begin + TARGETS_AT_ONCE].astype(np.float32, copy=False))
        cosines = queries @ block.T
        if bar_B is not None:
            cosines[cosines > torch.from_numpy(bar_B)[:, None]] = -torch.inf
        inside = pairs[slice(*np.searchsorted(pairs[:, 1], [begin, begin + len(block)]))]
        cosines[inside[:, 0], inside[:, 1] - begin] = -torch.inf
        rows = (cosines.amax(dim=1) > best[:, -1]).nonzero().flatten()  # few after the first blocks
        values, columns = _above(cosines[rows], best[rows, -1:], wanted)
        merged = torch.cat([best[rows], values], dim=1).topk(wanted, dim=1)
        best_rows[rows] = torch.cat([best_rows[rows], columns + begin], dim=1).gather(1, merged.indices)
        best[rows] = merged.values
    return best, best_rows


def _above(cosines_BM: torch.Tensor, least_B1: torch.Tensor, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the cosines above each query's least, and their columns, at most `wanted` of each; fewer end with -inf.

    After the first blocks few cosines are above the least of the nearest so far, and finding those takes a fraction of
    the time of sorting the block.
    """
    above = cosines_BM > least_B1
    counts = above.sum(dim=1)
    width = int(counts.max()) if len(counts) else 0
    if width > wanted:
        found = cosines_BM.topk(wanted, dim=1)
        return found.values, found.indices
    rows, columns = above.nonzero(as_tuple=True)
    places = torch.arange(len(rows)) - (counts.cumsum(dim=0) - counts)[rows]
    values_BK = torch.full((len(cosines_BM), width), -torch.inf)
    columns_BK = torch.zeros((len(cosines_BM), width), dtype=torch.long)
    values_BK[rows, places] = cosines_BM[rows, columns]
    columns_BK[rows, places] = columns
    return values_BK, columns_BK
