"""Filters mined negatives with a second model: removes false negatives and stores the scores as soft labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from vlm2vec.cache import cache_folder
from vlm2vec.data.examples import TrainExample
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.models.reranking.reranker import Reranker
from vlm2vec.training.reference import ReferenceModel
from vlm2vec.types import EmbeddingInput

Judged = tuple[list[list[int]], list[list[float]]]
"""For each pair, the pairs whose targets are its negatives; and the scores of its target, then of its negatives."""


class Judge(Protocol):
    """Scores candidates of a query; a higher score means more relevant, on any scale."""

    def prepare(self, items: Iterable[EmbeddingInput]) -> None:
        """Computes in large batches what `scores` will need."""

    def scores(self, query: EmbeddingInput, candidates: Sequence[EmbeddingInput]) -> Sequence[float]:
        """One score per candidate."""


class EmbedderJudge:
    """Scores by the cosines of an embedding model, whose vectors are kept in the embedding cache.

    Args:
        model: What `Embedder.from_pretrained` takes.
    """

    def __init__(self, model: str) -> None:
        self._reference = ReferenceModel(model)

    def prepare(self, items: Iterable[EmbeddingInput]) -> None:
        """Encodes each distinct input once, unless the cache has it."""
        self._reference.prepare(items)

    def scores(self, query: EmbeddingInput, candidates: Sequence[EmbeddingInput]) -> list[float]:
        """Returns the cosines."""
        vectors = self._reference.vectors([query, *candidates])
        cosines: list[float] = (vectors[1:] @ vectors[0]).tolist()
        return cosines


class RerankerJudge:
    """Scores by the log-odds of a reranker, which reads query and candidate together.

    Args:
        model: What `Reranker.from_pretrained` takes.
        prompt: The prompt of the reranker; None: its default.
    """

    def __init__(self, model: str, prompt: RerankPrompt | None = None) -> None:
        self._reranker = Reranker.from_pretrained(model, prompt=prompt)
        self._reranker.backbone.cache_images(cache_folder() / "vision")

    def prepare(self, items: Iterable[EmbeddingInput]) -> None:
        """Does nothing: a pair is known only when it is scored, and images are cached after their first use."""

    def scores(self, query: EmbeddingInput, candidates: Sequence[EmbeddingInput]) -> list[float]:
        """Returns the log-odds."""
        log_odds: list[float] = self._reranker.score(query, candidates).tolist()
        return log_odds


JUDGES = {"embedder": EmbedderJudge, "reranker": RerankerJudge}
"""Judges by their name in `vlm2vec mine --judge-kind`."""


def judge_negatives(
    examples: Sequence[TrainExample], nearest: Sequence[Sequence[int]], judge: Judge, num: int, margin: float
) -> Judged:
    """Keeps the candidates that the judge scores below the target.

    Args:
        examples: The pairs of a set.
        nearest: For each pair, the pairs whose targets are its candidates, nearest first.
        judge: The second model.
        num: Maximum number of negatives of each pair.
        margin: A negative's score is at least this far below the target's.
    """
    judge.prepare(item for example in examples for item in (example.query, example.target))
    negatives, scores = [], []
    for example, candidates in zip(examples, nearest, strict=True):
        targets = [example.target, *(examples[j].target for j in candidates)]
        positive, *others = judge.scores(example.query, targets)
        kept = [(j, score) for j, score in zip(candidates, others, strict=True) if score <= positive - margin][:num]
        negatives.append([j for j, _ in kept])
        scores.append([positive, *(score for _, score in kept)])
    return negatives, scores
