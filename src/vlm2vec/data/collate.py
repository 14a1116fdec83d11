"""Collates training pairs into the tensors of a step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vlm2vec.batch import Batch
from vlm2vec.data.examples import TrainExample
from vlm2vec.types import EmbeddingInput, by_reference, content_key


@dataclass
class PairBatch:
    """A batch of B pairs as model inputs.

    Attributes:
        inputs: The U distinct inputs of queries and targets; each is encoded once.
        query_rows: Row in `inputs` of each query, shape [B].
        target_rows: Row in `inputs` of each target, shape [M]: the positives in query order, then all negatives.
        query_keys: An integer per query; equal integers mean equal inputs, shape [B].
        target_keys: An integer per target; equal integers mean equal inputs, shape [M].
        target_ids: An integer per target that identifies its document by the `id` of the data; equal to `target_keys`
            if the data has no ids, shape [M].
        origins: File and row of each pair, for messages, length B.
        target_queries: Position in the batch of the query that each target was given with, shape [M]. Default: the
            first B targets belong to the queries in order, the remaining targets to no query (-1).
        is_positive: Whether each target is a positive of its query, shape [M]. Default: True for the first B.
        scores: Score of each target for its query, given by a reranker, for example; NaN (the default) if there is no
            score, shape [M].
        items: The untokenized inputs, if a second model (guide or teacher) encodes them, too.
        guide: Embeddings of a guide model for the rows of `inputs`, shape [U, E].
        teacher: Embeddings of a teacher for the rows of `inputs`, shape [U, F].
    """

    inputs: Batch
    query_rows: torch.Tensor
    target_rows: torch.Tensor
    query_keys: torch.Tensor
    target_keys: torch.Tensor
    target_ids: torch.Tensor
    origins: list[str]
    target_queries: torch.Tensor = None  # type: ignore[assignment]  # filled in below
    is_positive: torch.Tensor = None  # type: ignore[assignment]
    scores: torch.Tensor = None  # type: ignore[assignment]
    items: Sequence[EmbeddingInput] = ()
    guide: torch.Tensor | None = None
    teacher: torch.Tensor | None = None

    def __post_init__(self) -> None:
        numbers_M = torch.arange(len(self.target_keys), device=self.target_keys.device)
        if self.target_queries is None:
            self.target_queries = torch.where(numbers_M < len(self.query_rows), numbers_M, -1)
        if self.is_positive is None:
            self.is_positive = numbers_M < len(self.query_rows)
        if self.scores is None:
            self.scores = torch.full(numbers_M.shape, torch.nan, device=numbers_M.device)


def collate_pairs(
    process: Callable[[Sequence[EmbeddingInput]], Batch],
    examples: Sequence[TrainExample],
    merge_equal: bool = True,
    keep_items: bool = False,
) -> PairBatch:
    """Builds the batch of the given pairs.

    Args:
        process: The backbone's function that converts inputs to tensors.
        examples: The pairs.
        merge_equal: Whether equal queries share one row, and equal targets share one row. A query that equals its
            target always keeps its own row: with dropout the two rows are two views of one input, as in SimCSE.
        keep_items: Whether the batch keeps the untokenized inputs for a second model.
    """
    queries = [example.query for example in examples]
    # The first positives in query order, then further positives, then negatives; each with its query and its score.
    given = [
        *((b, e.target, e.target_id, _score(e, 0)) for b, e in enumerate(examples)),
        *((b, item, None, _score(e, k)) for b, e in enumerate(examples) for k, item in enumerate(e.targets) if k),
    ]
    num_positives = len(given)
    for b, e in enumerate(examples):
        given += [(b, item, None, _score(e, k)) for k, item in enumerate(e.negatives, start=len(e.targets))]
    target_queries, targets, ids, scores = zip(*given, strict=True)
    target_keys = [key_number(target) for target in targets]
    distinct: list[EmbeddingInput] = []
    rows = [_rows(side, distinct, merge_equal) for side in (queries, targets)]
    return PairBatch(
        process(distinct),
        torch.tensor(rows[0]),
        torch.tensor(rows[1]),
        torch.tensor([key_number(query) for query in queries]),
        torch.tensor(target_keys),
        torch.tensor(
            [
                key if i is None else _number(i.encode(errors="surrogatepass"))
                for key, i in zip(target_keys, ids, strict=True)
            ]
        ),
        [example.origin or example.source for example in examples],
        torch.tensor(target_queries),
        torch.arange(len(targets)) < num_positives,
        torch.tensor(scores, dtype=torch.float32),
        tuple(distinct) if keep_items else (),
    )


def _score(example: TrainExample, number: int) -> float:
    return example.scores[number] if example.scores else math.nan


def key_number(item: EmbeddingInput) -> int:
    """Returns an integer that identifies an input (see `content_key`). Files are compared by path and not read."""
    return _number(content_key(item, by_reference))


def _rows(items: Sequence[EmbeddingInput], distinct: list[EmbeddingInput], merge_equal: bool) -> list[int]:
    """Appends new items to `distinct`; returns the position of each item in it."""
    place: dict[object, int] = {}
    rows = []
    for i, item in enumerate(items):
        key = item if merge_equal else i
        if key not in place:
            place[key] = len(distinct)
            distinct.append(item)
        rows.append(place[key])
    return rows


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest())
