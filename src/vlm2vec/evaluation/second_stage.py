"""The second stage of an evaluation: a reranker orders the first candidates of each query.

Its scores are kept in the embedding cache, by reranker and by pair, with the time that each took. A killed run
therefore resumes, and a repeated run scores nothing and reports the same times.

Shapes: Q queries, M candidates, K candidates that are reranked, D embedding dim.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm2vec.cache import cache_folder
from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import EvalTask
from vlm2vec.evaluation.metrics import Ranked, all_metrics, mean_interval, values_of
from vlm2vec.evaluation.score import KeyOf, Pool, Reranked, RowsOf, Sample, pools, ranks_in, sampled
from vlm2vec.models.reranking.scores import with_cosine
from vlm2vec.retrieval.embedding_cache import EmbeddingCache, VectorCache
from vlm2vec.retrieval.rank import DEPTH, best_candidates, exact_scores
from vlm2vec.types import EmbeddingInput, EvalQuery

AT_ONCE = 512
"""Pairs that are written to the cache together; a kill loses fewer than this number and one query's."""
NUM_SHOWN = 5


@dataclass(frozen=True)
class RerankOptions:
    """What a second stage is made of.

    Attributes:
        model: As for `Reranker.from_pretrained`.
        top: Number of candidates of each query that the reranker reads. 50, as FreeRet (arXiv 2509.24621) reports.
        cosine_weight: The embedder's cosine times this number is added to the log-odds. 0: the reranker alone decides.
            1 / the temperature of the embedder's training weighs both as logits.
        options: Other arguments of `Reranker.from_pretrained`.
    """

    model: str
    top: int = 50
    cosine_weight: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


class PairRanker(Protocol):
    """Scores candidates of a query; `vlm2vec.models.reranking.reranker.Reranker` is one."""

    def score(
        self,
        query: EmbeddingInput,
        candidates: Sequence[EmbeddingInput],
        *,
        on_error: Callable[[int, UserError], None],
    ) -> np.ndarray:
        """One score per candidate, higher is more relevant; NaN where `on_error` was called."""
        ...


def open_second_stage(options: RerankOptions, cache: Path) -> SecondStage:
    """Loads the reranker and opens its part of the embedding cache.

    Args:
        options: The reranker and the number of candidates.
        cache: Folder of the embedding cache.

    Raises:
        UserError: if the model cannot be loaded or cannot rerank.
    """
    from vlm2vec.models.reranking.reranker import Reranker

    ranker = Reranker.from_pretrained(options.model, **options.options)
    ranker.backbone.cache_images(cache_folder() / "vision")
    about = ranker.describe(options.model)
    facts = {**about, "model": options.model}
    return SecondStage(ranker, EmbeddingCache(cache, about), options.top, facts, options.cosine_weight)


class SecondStage:
    """Orders the first candidates of each query by a reranker's scores.

    Args:
        ranker: Reads query and candidate together.
        cache: Keeps score and seconds of each pair.
        top: Number of candidates of each query that are reranked.
        about: What the scores depend on, for reports.
        cosine_weight: See `RerankOptions`.
    """

    def __init__(
        self,
        ranker: PairRanker,
        cache: VectorCache,
        top: int,
        about: Mapping[str, str],
        cosine_weight: float = 0.0,
    ) -> None:
        self.ranker, self.top, self.cosine_weight = ranker, top, cosine_weight
        self.name = f"{about['model']} + {cosine_weight:g} cosine" if cosine_weight else about["model"]
        self.about: dict[str, Any] = {**about, "top": top} | ({"cosine_weight": cosine_weight} if cosine_weight else {})
        self._cache = cache
        self._new: dict[bytes, tuple[float, float]] = {}

    def __call__(
        self,
        task: EvalTask,
        queries: Sequence[EvalQuery],
        rows_of: RowsOf,
        key_of: KeyOf,
        merged: bool,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Reranked:
        """Scores of a task in the new order.

        Args:
            task: The task's facts.
            queries: The queries with their candidates and the relevant ones.
            rows_of: The embedder's vectors by key.
            key_of: Identifies an input's content.
            merged: See `evaluation.score.score_task`.
            progress: Called with the number of pairs done since the last call, cached ones included.
        """
        ranked: dict[int, Ranked] = {}
        samples: dict[int, Sample] = {}
        seconds, num_unreadable = 0.0, 0
        shown = sampled(len(queries))
        for number, pool, gains, first in self._first_stages(queries, rows_of, key_of, merged):
            query = queries[number]
            scores_K, spent = self._pairs(query.query, key_of(query.query), pool, first.places[: self.top])
            cosines_K = first.scores[: len(scores_K)]
            order = reordered(first, with_cosine(scores_K, cosines_K, self.cosine_weight))
            values_M1 = order.values_M[:, None]
            [ranked[number]] = ranks_in(np.ones((1, 1)), values_M1, pool, [list(gains)], [list(gains.values())])
            seconds += spent
            num_unreadable += int(np.isnan(scores_K).sum())
            progress(len(scores_K))
            if number in shown and gains:
                samples[number] = _sample(query, pool, order, gains, "score" if self.cosine_weight else "log-odds")
        self._write()
        in_order = [ranked[number] for number in range(len(queries))]
        values = values_of(task.metric, in_order)
        return Reranked(
            self.name,
            self.top,
            float(values.mean()),
            all_metrics(in_order),
            mean_interval(values),
            seconds / len(queries),
            num_unreadable,
            [samples[number] for number in sorted(samples)],
        )

    def fill(
        self,
        queries: Sequence[EvalQuery],
        rows_of: RowsOf,
        key_of: KeyOf,
        merged: bool,
        share: tuple[int, int],
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Scores the pairs of this process's queries of a task, so that any process finds them in the cache.

        Args:
            queries: All queries of the task.
            rows_of: See `__call__`.
            key_of: See `__call__`.
            merged: See `__call__`.
            share: (i, n): this process takes queries i, i + n, i + 2n, …
            progress: See `__call__`.
        """
        for number, pool, _, first in self._first_stages(queries, rows_of, key_of, merged, share):
            query = queries[number].query
            progress(len(self._pairs(query, key_of(query), pool, first.places[: self.top])[0]))
        self._write()

    def _first_stages(
        self,
        queries: Sequence[EvalQuery],
        rows_of: RowsOf,
        key_of: KeyOf,
        merged: bool,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[int, Pool, dict[int, float], FirstStage]]:
        """Number, candidates, gains and first stage of each query of a share; those with equal candidates together."""
        for pool, numbers in pools(queries, key_of, merged):
            mine = [number for number in numbers if number % share[1] == share[0]]
            rows_MD = rows_of(pool.keys) if mine else None
            for number in mine:
                gains = pool.relevant(queries[number])
                query_D = np.asarray(rows_of([key_of(queries[number].query)])[:])[0]
                yield number, pool, gains, first_stage(query_D, rows_MD, pool, list(gains), self.top)

    def _pairs(self, query: EmbeddingInput, key: bytes, pool: Pool, places: Sequence[int]) -> tuple[np.ndarray, float]:
        """Scores of a query with some candidates, [K], and the seconds that they took when they were computed."""
        keys = [hashlib.sha256(key + pool.keys[place]).digest() for place in places]
        if any(pair not in self._cache for pair in keys):
            self._cache.refresh()
        lacking = {
            pair: pool.candidates[place]
            for pair, place in zip(keys, places, strict=True)
            if pair not in self._cache and pair not in self._new
        }
        if lacking:
            since = time.perf_counter()
            scores = self.ranker.score(query, list(lacking.values()), on_error=lambda index, error: None)
            each = float(np.float32((time.perf_counter() - since) / len(lacking)))  # as the cache will return it
            self._new.update((pair, (float(score), each)) for pair, score in zip(lacking, scores, strict=True))
        known = [pair for pair in dict.fromkeys(keys) if pair in self._cache]
        found = dict(zip(known, np.asarray(self._cache.rows(known)[:]).tolist(), strict=True)) if known else {}
        found |= {pair: self._new[pair] for pair in keys if pair not in found}
        if len(self._new) >= AT_ONCE:
            self._write()
        return np.array([found[pair][0] for pair in keys], np.float32), sum(
            found[pair][1] for pair in dict.fromkeys(keys)
        )

    def _write(self) -> None:
        """Writes new scores; an unreadable pair is tried again by the next run, since its file may be repaired."""
        good = {pair: value for pair, value in self._new.items() if not np.isnan(value[0])}
        if good:
            self._cache.put(list(good), np.array(list(good.values()), np.float32))
        self._new.clear()


@dataclass(frozen=True)
class FirstStage:
    """The embedder's order of one query's candidates.

    Attributes:
        places: Positions of the first candidates, best first; a relevant one comes after others of equal cosine.
        scores: Their cosines.
        golds: Cosines of the relevant candidates by position.
        num_candidates: M.
    """

    places: list[int]
    scores: np.ndarray
    golds: dict[int, float]
    num_candidates: int


def first_stage(query_D: np.ndarray, rows_MD: Any, pool: Pool, relevant: Sequence[int], top: int) -> FirstStage:
    """The first candidates of a query by cosine, deep enough for `top` and for every metric."""
    golds = {pool.keys[place] for place in relevant}
    places, cosines = best_candidates(query_D, rows_MD, max(top, DEPTH) + len(relevant))
    order = sorted(range(len(places)), key=lambda i: (-cosines[i], pool.keys[places[i]] in golds, places[i]))
    gold_rows = np.asarray(rows_MD[list(relevant)]) if relevant else np.empty((0, len(query_D)))
    gold_scores = exact_scores(query_D.astype(np.float64), gold_rows)
    return FirstStage(
        [int(places[i]) for i in order],
        cosines[order],
        dict(zip(relevant, gold_scores.tolist(), strict=True)),
        len(rows_MD),
    )


@dataclass(frozen=True)
class NewOrder:
    """Candidates after reranking: a value for each, higher is better, and the first places with their scores.

    An unreadable candidate has the score -inf.
    """

    values_M: np.ndarray
    places: list[int]
    scores: list[float]


def reordered(first: FirstStage, scores_K: np.ndarray) -> NewOrder:
    """Puts the reranked candidates in front, by score; then the unreadable ones; then the rest by cosine.

    Equal scores give equal values, so that a relevant candidate loses a tie as in the first stage.
    """
    num = len(scores_K)
    worst = min([*first.scores.tolist(), *first.golds.values()]) - 1
    values_M = worst - np.arange(first.num_candidates, dtype=np.float64)  # distinct values, which rank faster
    for place, cosine in (*first.golds.items(), *zip(first.places, first.scores.tolist(), strict=True)):
        values_M[place] = cosine
    readable = ~np.isnan(scores_K)
    steps_K = np.empty(num)
    steps_K[~readable] = np.arange(num - readable.sum(), 0, -1)
    steps_K[readable] = num + 1 + np.unique(scores_K[readable], return_inverse=True)[1]
    values_M[first.places[:num]] = np.ceil(values_M.max()) + steps_K
    by_value = sorted(range(num), key=lambda i: -steps_K[i])
    return NewOrder(
        values_M.astype(np.float32),
        [first.places[i] for i in by_value],
        np.nan_to_num(scores_K[by_value], nan=-np.inf).tolist(),
    )


def _sample(query: EvalQuery, pool: Pool, order: NewOrder, relevant: Mapping[int, float], measure: str) -> Sample:
    found = zip(order.places[:NUM_SHOWN], order.scores, strict=False)
    top = tuple((pool.candidates[place], score, place in relevant) for place, score in found)
    return Sample(query.query, query.candidates[query.relevant[0]], top, measure)
