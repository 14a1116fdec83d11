"""Hard negatives: the targets nearest to each query that are not its own, optionally judged by a second model.

Shapes: N pairs, M distinct targets, D embedding dim.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from vlm2vec.data.examples import TrainExample
from vlm2vec.data.mmeb.images import list_sets, write_negatives
from vlm2vec.data.mmeb.train_rows import TrainRows, read_train_set
from vlm2vec.errors import UserError
from vlm2vec.retrieval.rank import Rows
from vlm2vec.training.judging import Judge, judge_negatives
from vlm2vec.training.reference import ReferenceModel

BLOCK, TARGETS_AT_ONCE = 1024, 8192  # a block of scores is 32 MiB, however many pairs and targets there are


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


def mine_negatives(
    queries_ND: Rows,
    targets_MD: Rows,
    own_N: Sequence[int] | np.ndarray,
    positives: Positives,
    rule: MiningRule,
) -> list[list[int]]:
    """For each query, the rows of `targets_MD` that are its hard negatives, nearest first.

    Args:
        queries_ND: Unit-norm query vectors.
        targets_MD: Unit-norm vectors of distinct targets.
        own_N: Row of each query's positive.
        positives: All rows that are no negatives of that query (the positives of every equal query).
        rule: Ranks are counted among targets that are not positives.
    """
    wanted = rule.skip + rule.num if rule.max_rank is None else max(rule.max_rank, rule.skip)
    found: list[list[int]] = []
    for start in range(0, len(queries_ND), BLOCK):
        part_BD = queries_ND[start : start + BLOCK].astype(np.float32, copy=False)
        rows = range(start, start + len(part_BD))
        own_BD = targets_MD[[int(own_N[n]) for n in rows]].astype(np.float32, copy=False)
        limit_B = np.full(len(part_BD), np.inf, np.float32)
        if rule.margin is not None:
            limit_B = np.einsum("bd,bd->b", part_BD, own_BD) - np.float32(rule.margin)
        # A rank limit counts every target that is not a positive; without it, only targets below the limit compete.
        bar_B = limit_B if rule.max_rank is None else np.full_like(limit_B, np.inf)
        cosines, columns = _nearest(part_BD, targets_MD, [positives[n] for n in rows], bar_B, wanted)
        for limit, values, places in zip(limit_B.tolist(), cosines.tolist(), columns.tolist(), strict=True):
            ranked = list(zip(values, places, strict=True))[rule.skip :]
            allowed = [row for cosine, row in ranked if -np.inf < cosine <= limit]
            found.append(rule.chosen(allowed, len(found)))
    return found


def _nearest(
    queries_BD: np.ndarray, targets_MD: Rows, positives: Sequence[set[int]], bar_B: np.ndarray, wanted: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosines and rows of each query's `wanted` nearest targets that are not positives and not above its bar.

    The targets are scored in blocks and only the best so far are kept, so memory does not grow with M. Positions
    without a target have a cosine of -inf.
    """
    queries, bar_B1 = torch.from_numpy(queries_BD), torch.from_numpy(bar_B)[:, None]
    best = torch.full((len(queries), wanted), -torch.inf)
    best_rows = torch.zeros((len(queries), wanted), dtype=torch.long)
    pairs = np.array([(b, m) for b, mine in enumerate(positives) for m in mine], np.int64).reshape(-1, 2)
    for begin in range(0, len(targets_MD), TARGETS_AT_ONCE):
        block = torch.from_numpy(targets_MD[begin : begin + TARGETS_AT_ONCE].astype(np.float32, copy=False))
        cosines = queries @ block.T
        cosines[cosines > bar_B1] = -torch.inf
        inside = pairs[(pairs[:, 1] >= begin) & (pairs[:, 1] < begin + len(block))]
        cosines[inside[:, 0], inside[:, 1] - begin] = -torch.inf
        near = cosines.topk(min(wanted, len(block)), dim=1)
        merged = torch.cat([best, near.values], dim=1).topk(wanted, dim=1)
        best_rows = torch.cat([best_rows, near.indices + begin], dim=1).gather(1, merged.indices)
        best = merged.values
    return best, best_rows


def mine(
    model: str,
    root: Path,
    output: Path,
    rule: MiningRule,
    sets: Sequence[str] = (),
    judge: Judge | None = None,
    together: bool = False,
    open_finder: Callable[[str], ReferenceModel] | None = None,
) -> dict[str, float]:
    """Writes copies of the sets of `root` with mined negatives to `output`.

    Vectors are kept in the embedding cache, so an interrupted run encodes nothing twice.

    Args:
        model: Finds the candidates.
        root: A folder in the MMEB-train layout.
        output: Another folder.
        rule: Which candidates become negatives.
        sets: Names; default: all.
        judge: Scores the `rule.judged` nearest candidates. Candidates that it finds closer than the positive are kept
            out, and its scores are written as soft labels.
        together: Whether candidates come from all these sets. Default: from the pair's own set.
        open_finder: Opens the model; None: in this process.

    Returns:
        Mean number of negatives of a pair, by set.

    Raises:
        UserError: if `output` is `root` or already contains one of the sets, or for invalid input.
    """
    names = list(sets) or list_sets(root)
    for name in names:
        if (output / name).exists():
            raise UserError(f"{output / name}: already exists; choose another output or delete it")
    finder = (open_finder or ReferenceModel)(model)
    means = {}
    for group in [names] if together else [[name] for name in names]:
        by_set = {name: read_train_set(root, name, use_negatives=False) for name in group}
        examples = _Joined(list(by_set.values()))
        nearest = _of_examples(finder, examples, rule if judge is None else _for_a_judge(rule))
        negatives, scores = nearest, None
        if judge is not None:
            negatives, scores = judge_negatives(examples, nearest, judge, rule.num, rule.judge_margin)
        write_negatives(root, {name: len(found) for name, found in by_set.items()}, negatives, output, scores)
        begin = 0
        for name, found in by_set.items():
            means[name] = sum(map(len, negatives[begin : begin + len(found)])) / len(found)
            begin += len(found)
    return means


def _for_a_judge(rule: MiningRule) -> MiningRule:
    return replace(rule, num=max(rule.num, rule.judged))


class _Joined(Sequence[TrainExample]):
    """The pairs of several sets, one set after another; examples are made when they are asked for."""

    def __init__(self, sets: Sequence[TrainRows]) -> None:
        self._sets, self._begins = sets, [0, *np.cumsum([len(one) for one in sets]).tolist()]

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __iter__(self) -> Iterator[TrainExample]:
        return chain.from_iterable(self._sets)

    def __getitem__(self, number: Any) -> Any:
        place = bisect_right(self._begins, number) - 1
        return self._sets[place][number - self._begins[place]]


class _PositivesOfEqualQueries:
    """For each pair, the targets of all pairs with an equal query, and the query itself if it is a target.

    Args:
        query_N: Number of each pair's query among the distinct queries.
        own_N: Row of each pair's target.
        itself_Q: Row of the target that equals each distinct query; -1: none does.
    """

    def __init__(self, query_N: np.ndarray, own_N: np.ndarray, itself_Q: np.ndarray) -> None:
        order = np.argsort(query_N, kind="stable")
        self._query_N, self._itself_Q, self._sorted_N = query_N, itself_Q, own_N[order]
        self._begins = np.searchsorted(query_N[order], np.arange(len(itself_Q) + 1))

    def __getitem__(self, number: int) -> set[int]:
        query = self._query_N[number]
        rows = set(self._sorted_N[self._begins[query] : self._begins[query + 1]].tolist())
        return rows | ({int(self._itself_Q[query])} - {-1})


def _of_examples(finder: ReferenceModel, examples: Sequence[TrainExample], rule: MiningRule) -> list[list[int]]:
    """For each pair, the pairs whose targets are its negatives. Inputs are equal if their content is."""
    keys = finder.prepare(item for example in examples for item in (example.query, example.target))
    queries, targets = keys[::2], keys[1::2]
    column: dict[bytes, int] = {}
    own_N = np.fromiter((column.setdefault(key, len(column)) for key in targets), np.int64, len(targets))
    _, pair_of = np.unique(own_N, return_index=True)  # the first pair that has each target
    number: dict[bytes, int] = {}
    query_N = np.fromiter((number.setdefault(key, len(number)) for key in queries), np.int64, len(queries))
    itself_Q = np.fromiter((column.get(key, -1) for key in number), np.int64, len(number))
    positives = _PositivesOfEqualQueries(query_N, own_N, itself_Q)
    found = mine_negatives(finder.rows(queries), finder.rows(list(column)), own_N, positives, rule)
    return [pair_of[chosen].tolist() for chosen in found]
