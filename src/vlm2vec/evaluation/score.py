"""From vectors to the scores of one task. Shapes: Q queries, M candidates, D embedding dim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from vlm2vec.evaluation.benchmark import EvalTask
from vlm2vec.evaluation.metrics import Ranked, all_metrics, chance_of, mean_interval, values_of
from vlm2vec.retrieval.embedding_cache import InputKeys
from vlm2vec.retrieval.rank import best_candidates, rank_relevant
from vlm2vec.types import EmbeddingInput, EvalQuery

SAMPLES_PER_TASK = 5
MOST_CONFUSIONS = 5
MOST_LABELS = 10_000
"""With more candidates, confusions are not counted: each needs a pass over all of them."""


@dataclass(frozen=True)
class Sample:
    """A query of a task with its best candidates, for the report."""

    query: EmbeddingInput
    gold: EmbeddingInput
    top: tuple[tuple[EmbeddingInput, float, bool], ...]
    """(candidate, score, is it relevant), best first."""
    measure: str = "cosine"
    """What the scores are."""


@dataclass(frozen=True)
class Reranked:
    """Scores of one task after a reranker has ordered the first candidates of each query.

    Attributes:
        model: The reranker, as the user named it, and the weight of the embedder's cosine if it has one.
        top: Number of candidates of each query that it read.
        score: The task's own metric.
        metrics: Every metric at every cutoff.
        interval: Bootstrap interval of the score at 95 %.
        seconds_per_query: Mean time to score the pairs of a query, measured when each pair was scored.
        num_unreadable: Number of pairs that the reranker could not read; they rank after those that it could.
        samples: Queries with their first candidates in the new order.
    """

    model: str
    top: int
    score: float
    metrics: dict[str, float]
    interval: tuple[float, float]
    seconds_per_query: float
    num_unreadable: int
    samples: list[Sample] = field(default_factory=list)


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
    """The largest number of candidates of a query."""
    seconds: float
    samples: list[Sample] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    """Every metric at every cutoff."""
    interval: tuple[float, float] | None = None
    """Bootstrap interval of the score at 95 %."""
    confusions: list[tuple[str, str, int]] = field(default_factory=list)
    """The most frequent (gold, candidate ranked above it, number of queries), for texts that are gold repeatedly."""
    reranked: Reranked | None = None
    """The scores after reranking, if there was a second stage."""


RowsOf = Callable[[Sequence[bytes]], Any]
KeyOf = Callable[[EmbeddingInput], bytes]


@dataclass(frozen=True)
class Pool:
    """The candidates that some queries are ranked against."""

    candidates: list[EmbeddingInput]
    keys: list[bytes]
    """Keys of `candidates`, in the same order."""
    place: list[int]
    """Position among `candidates` of each candidate as given."""

    @staticmethod
    def of(given: Sequence[EmbeddingInput], key_of: KeyOf, merged: bool) -> Pool:
        """The candidates as given, or with equal content merged into one candidate."""
        keys = _keys(given, key_of)
        if not merged:
            return Pool(list(given), keys, list(range(len(keys))))
        first = dict(zip(reversed(keys), reversed(given), strict=True))
        position = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        return Pool([first[key] for key in position], list(position), [position[key] for key in keys])

    def relevant(self, query: EvalQuery) -> dict[int, float]:
        """Gain by position; the same candidate counts once, with the highest gain."""
        gains: dict[int, float] = {}
        for index, gain in zip(query.relevant, query.gains or (1.0,) * len(query.relevant), strict=True):
            position = self.place[index]
            gains[position] = max(gain, gains.get(position, gain))
        return gains

    @cached_property
    def _repeats(self) -> dict[bytes, list[int]]:
        """Positions by key, where several candidates have one content."""
        if len(set(self.keys)) == len(self.keys):
            return {}
        by_key: dict[bytes, list[int]] = {}
        for position, key in enumerate(self.keys):
            by_key.setdefault(key, []).append(position)
        return {key: positions for key, positions in by_key.items() if len(positions) > 1}

    def again(self, position: int, relevant: Container[int]) -> list[int]:
        """The other positions of a relevant candidate listed several times: the same input, not just content."""
        twice = self._repeats.get(self.keys[position], ())
        item = self.candidates[position]
        return [i for i in twice if i != position and i not in relevant and self.candidates[i] == item]

    def behind(self, position: int, relevant: Container[int]) -> list[int]:
        """Candidates of equal content but another name, listed after a relevant one; they rank after it."""
        twice = self._repeats.get(self.keys[position], ())
        item = self.candidates[position]
        return [i for i in twice if i > position and i not in relevant and self.candidates[i] != item]


def _keys(items: Sequence[EmbeddingInput], key_of: KeyOf) -> list[bytes]:
    """The keys of inputs, in order: `InputKeys` finds the known ones, nearly all of a pool, without a call for each."""
    return key_of.of(items) if isinstance(key_of, InputKeys) else list(map(key_of, items))


def pools(queries: Sequence[EvalQuery], key_of: KeyOf, merged: bool) -> Iterator[tuple[Pool, list[int]]]:
    """Each pool of candidates with the numbers of the queries that are ranked against it."""
    together: dict[int, list[int]] = {}
    for number, query in enumerate(queries):
        together.setdefault(id(query.candidates), []).append(number)
    for numbers in together.values():
        yield Pool.of(queries[numbers[0]].candidates, key_of, merged), numbers


def sampled(num_queries: int) -> set[int]:
    """Numbers of the queries that reports show, spread evenly."""
    return {round(i * (num_queries - 1) / (SAMPLES_PER_TASK - 1)) for i in range(SAMPLES_PER_TASK)}


def score_task(
    task: EvalTask,
    queries: Sequence[EvalQuery],
    rows_of: RowsOf,
    key_of: KeyOf,
    seconds: float = 0.0,
    merged: bool = False,
) -> TaskResult:
    """Ranks every query's candidates and computes all metrics.

    Queries that share one candidate tuple (global scope) are ranked together, in blocks.

    Args:
        task: The task's facts.
        queries: The queries with their candidates and the relevant ones.
        rows_of: Vectors by key, see `retrieval.rank.Rows`.
        key_of: Identifies an input's content.
        seconds: Time for encoding.
        merged: Candidates with equal content are one candidate; otherwise each takes a place in the ranking.
    """
    ranked: dict[int, Ranked] = {}
    samples: dict[int, Sample] = {}
    shown = sampled(len(queries))
    sizes: dict[int, int] = {}
    confused: Counter[tuple[str, str]] = Counter()
    repeated = _repeated_golds(queries)
    for pool, numbers in pools(queries, key_of, merged):
        rows_MD = rows_of(pool.keys)
        vectors_QD = np.asarray(rows_of([key_of(queries[number].query) for number in numbers])[:])
        gains = [pool.relevant(queries[number]) for number in numbers]
        places = [list(mine) for mine in gains]
        worth = [list(mine.values()) for mine in gains]
        for i, found in enumerate(ranks_in(vectors_QD, rows_MD, pool, places, worth)):
            ranked[numbers[i]] = found
            sizes[numbers[i]] = len(pool.candidates)
            if numbers[i] in shown and places[i]:
                samples[numbers[i]] = _sample(queries[numbers[i]], pool, rows_MD, vectors_QD[i], places[i])
            gold = _gold(queries[numbers[i]])
            if gold in repeated and min(found.ranks) > 1 and len(pool.keys) <= MOST_LABELS:
                confused[gold, _first_wrong(pool, rows_MD, vectors_QD[i], places[i])] += 1
    in_order = [ranked[number] for number in range(len(queries))]
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
        mean_interval(values),
        [(*pair, count) for pair, count in confused.most_common(MOST_CONFUSIONS) if count > 1],
    )


def ranks_in(
    vectors_QD: np.ndarray, rows_MD: Any, pool: Pool, places: list[list[int]], worth: list[list[float]]
) -> list[Ranked]:
    """Ranks of the relevant candidates of each query; a candidate that is listed several times has its best rank.

    Candidates of equal content rank in the order in which they are listed, as in the reference evaluation: no model can
    tell them apart. Any other tie is lost by the relevant candidate.
    """
    again = [{place: pool.again(place, mine) for place in mine} for mine in map(dict.fromkeys, places)]
    everywhere, gains = [], []
    for mine, weights, twice in zip(places, worth, again, strict=True):
        more = [
            (other, gain)
            for place, gain in zip(mine, weights, strict=True)
            for other in (*twice[place], *pool.behind(place, twice))
        ]
        extra = dict(more)  # each place once
        everywhere.append([*mine, *extra])
        gains.append([*weights, *extra.values()])
    ranked = []
    for i, ranks in enumerate(rank_relevant(vectors_QD, rows_MD, everywhere, gains)):
        rank_of = dict(zip(everywhere[i], ranks, strict=True))
        best, further = [], []
        for place, gain in zip(places[i], worth[i], strict=True):
            first, *rest = sorted(rank_of[other] for other in (place, *again[i][place]))
            best.append(first)
            further += [(rank, gain) for rank in rest]
        ranked.append(Ranked(tuple(best), tuple(worth[i]), tuple(further)))
    return ranked


def _gold(query: EvalQuery) -> str:
    """The text of the first relevant candidate; empty without one, or for an image."""
    gold = query.candidates[query.relevant[0]] if query.relevant else None
    return (gold.text or "").strip() if gold and not gold.images and not gold.video else ""


def _repeated_golds(queries: Sequence[EvalQuery]) -> set[str]:
    """Texts that are the gold of several queries, such as class names: only these can be confused repeatedly."""
    counts = Counter(map(_gold, queries))
    return {text for text, count in counts.items() if text and count > 1}


def _first_wrong(pool: Pool, rows_MD: Any, query_D: np.ndarray, relevant: Sequence[int]) -> str:
    """Text of the best candidate that is not relevant."""
    places, _ = best_candidates(query_D, rows_MD, len(relevant) + 1)
    wrong = next(place for place in places if int(place) not in relevant)
    return (pool.candidates[wrong].text or "").strip()


def _sample(query: EvalQuery, pool: Pool, rows_MD: Any, query_D: np.ndarray, relevant: list[int]) -> Sample:
    places, scores = best_candidates(query_D, rows_MD, 5)
    found = zip(places, scores, strict=True)
    top = tuple((pool.candidates[place], float(score), int(place) in relevant) for place, score in found)
    return Sample(query.query, query.candidates[query.relevant[0]], top)
