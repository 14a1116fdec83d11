"""Hard negatives of training sets: the targets nearest to each query, optionally judged by a second model.

Shapes: N pairs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec.data.examples import TrainExample
from vlm2vec.data.mmeb.images import list_sets, write_negatives
from vlm2vec.data.mmeb.train_rows import TrainRows, read_train_set
from vlm2vec.errors import UserError
from vlm2vec.progress import progress_bar
from vlm2vec.training.judging import Judge, judge_negatives
from vlm2vec.training.nearest import MiningRule, Positives, mine_negatives
from vlm2vec.training.reference import ReferenceModel


class Finder(ReferenceModel):
    """The model that finds negatives: encodes the inputs, and compares their vectors in this process."""

    def negatives(
        self,
        queries: Sequence[bytes],
        targets: Sequence[bytes],
        own_N: np.ndarray,
        positives: Positives,
        rule: MiningRule,
        progress: Callable[[int], None],
    ) -> list[list[int]]:
        """See `mine_negatives`; queries and targets are keys of prepared inputs."""
        return mine_negatives(self.rows(queries), self.rows(targets), own_N, positives, rule, progress)


def mine(
    model: str,
    root: Path,
    output: Path,
    rule: MiningRule,
    sets: Sequence[str] = (),
    judge: Judge | None = None,
    together: bool = False,
    open_finder: Callable[[str], Finder] | None = None,
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
    finder = (open_finder or Finder)(model)
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


def _of_examples(finder: Finder, examples: Sequence[TrainExample], rule: MiningRule) -> list[list[int]]:
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
    with progress_bar("finding negatives", len(queries)) as advance:
        found = finder.negatives(queries, list(column), own_N, positives, rule, advance)
    return [pair_of[chosen].tolist() for chosen in found]
