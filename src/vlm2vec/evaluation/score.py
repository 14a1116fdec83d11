"""From vectors to the scores of one task. Shapes: Q queries, M candidates, D embedding dim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm2vec.evaluation.benchmark import EvalTask
from vlm2vec.evaluation.metrics import Ranked, all_metrics, bootstrap_interval, chance_of, values_of
from vlm2vec.retrieval.rank import best_candidates, rank_relevant
from vlm2vec.types import EmbeddingInput, EvalQuery

SAMPLES_PER_TASK = 5


@dataclass(frozen=True)
class Sample:
    """One query of a task with its best candidates, for people to look at."""

    query: EmbeddingInput
    gold: EmbeddingInput
    top: tuple[tuple[EmbeddingInput, float, bool], ...]
    """(candidate, cosine, is it relevant), best first."""


@dataclass
class TaskResult:
    """Scores of one task."""

    task: EvalTask
    score: float
    """The task's own metric."""
    chance: float
    """Expected score of a random ranking."""
    num_queries: int
    num_candidates: int
    """The most candidates that a query of the task has."""
    seconds: float
    samples: list[Sample] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    """Every metric at every cut."""
    interval: tuple[float, float] | None = None
    """Bootstrap interval of the score, 95 %."""


RowsOf = Callable[[Sequence[bytes]], Any]
KeyOf = Callable[[EmbeddingInput], bytes]


@dataclass(frozen=True)
class _Race:
    """The candidates of some queries, equal ones merged: content that is the same cannot be told apart."""

    candidates: list[EmbeddingInput]
    place: dict[bytes, int]
    """Position among `candidates` by key."""
    keys: list[bytes]
    """Of the candidates as given, in their order."""

    @staticmethod
    def of(candidates: Sequence[EmbeddingInput], key_of: KeyOf) -> _Race:
        keys = [key_of(item) for item in candidates]
        first = dict(zip(reversed(keys), reversed(candidates), strict=True))
        place = {key: position for position, key in enumerate(dict.fromkeys(keys))}
        return _Race([first[key] for key in place], place, keys)

    def relevant(self, query: EvalQuery) -> dict[int, float]:
        """Gain by position; equal relevant candidates count once, with the highest gain."""
        gains: dict[int, float] = {}
        for index, gain in zip(query.relevant, query.gains or (1.0,) * len(query.relevant), strict=True):
            position = self.place[self.keys[index]]
            gains[position] = max(gain, gains.get(position, gain))
        return gains


def score_task(
    task: EvalTask,
    queries: Sequence[EvalQuery],
    rows_of: RowsOf,
    key_of: KeyOf,
    seconds: float = 0.0,
) -> TaskResult:
    """Ranks every query's candidates and computes all metrics.

    Queries that share one candidate tuple (global scope) are ranked together, in blocks.

    Args:
        task: Its facts.
        queries: With candidates, of which the relevant ones are known.
        rows_of: Vectors by key, see `retrieval.rank.Rows`.
        key_of: Identifies an input's content; called for every candidate of every query.
        seconds: What encoding took.
    """
    together: dict[int, list[int]] = {}
    for number, query in enumerate(queries):
        together.setdefault(id(query.candidates), []).append(number)
    ranked: dict[int, Ranked] = {}
    samples: dict[int, Sample] = {}
    shown = {round(i * (len(queries) - 1) / (SAMPLES_PER_TASK - 1)) for i in range(SAMPLES_PER_TASK)}
    sizes: dict[int, int] = {}
    for numbers in together.values():
        race = _Race.of(queries[numbers[0]].candidates, key_of)
        rows_MD = rows_of(list(race.place))
        vectors_QD = np.asarray(rows_of([key_of(queries[number].query) for number in numbers])[:])
        gains = [race.relevant(queries[number]) for number in numbers]
        places = [list(mine) for mine in gains]
        worth = [list(mine.values()) for mine in gains]
        for i, ranks in enumerate(rank_relevant(vectors_QD, rows_MD, places, worth)):
            ranked[numbers[i]] = Ranked(tuple(ranks), tuple(worth[i]))
            sizes[numbers[i]] = len(race.candidates)
            if numbers[i] in shown:
                samples[numbers[i]] = _sample(queries[numbers[i]], race, rows_MD, vectors_QD[i], places[i])
    in_order = [ranked[number] for number in range(len(queries))]
    assert task.metric is not None, "a task without a metric has no reader"
    values = values_of(task.metric, in_order)
    return TaskResult(
        task,
        float(values.mean()),
        float(np.mean([chance_of(task.metric, ranked[n].graded, sizes[n]) for n in range(len(queries))])),
        len(queries),
        max(len(query.candidates) for query in queries),
        seconds,
        [samples[number] for number in sorted(samples)],
        all_metrics(in_order),
        bootstrap_interval(values),
    )


def _sample(query: EvalQuery, race: _Race, rows_MD: Any, query_D: np.ndarray, relevant: list[int]) -> Sample:
    places, scores = best_candidates(query_D, rows_MD, 5)
    found = zip(places, scores, strict=True)
    top = tuple((race.candidates[place], float(score), int(place) in relevant) for place, score in found)
    return Sample(query.query, query.candidates[query.relevant[0]], top)
