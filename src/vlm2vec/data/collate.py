"""Pairs -> the tensors of a step."""

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
    """B pairs, ready for a model.

    Attributes:
        inputs: The distinct inputs of both sides, U in all; each becomes one vector.
        query_rows: Row in `inputs` of each query, shape [B].
        target_rows: Row in `inputs` of each target, shape [M]: the positives in query order, then all negatives.
        query_keys: One integer a query; equal integers mean equal inputs, shape [B].
        target_keys: One integer a target; equal integers mean equal inputs, shape [M].
        target_ids: One integer a target: the document that it is, by the data's own `id`; where the data has none, as
            `target_keys`, shape [M].
        origins: Where each pair comes from, for messages, length B.
        target_queries: Position in the batch of the query that each target came with, shape [M]. Default: the first B
            targets belong to the queries in order, the others to none (-1).
        is_positive: Whether a target is a positive of that query, shape [M]. Default: the first B are.
        scores: A judge's score of each target for that query; NaN where there is none (the default), shape [M].
        items: What `inputs` was made of, where a second model encodes it, too.
        guide: Vectors of a guide model by row of `inputs`, shape [U, E].
        teacher: Vectors of a teacher by row of `inputs`, shape [U, F].
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
    """The batch of these pairs, made by a backbone's processor.

    Args:
        process: Inputs -> tensors.
        examples: The pairs.
        merge_equal: Equal inputs of one side become one row. A query that equals its target keeps a row of its own:
            with dropout the two are two views of one input, as some methods want.
        keep_items: Whether the batch carries the inputs themselves, for a second model to encode.
    """
    queries = [example.query for example in examples]
    # First positives in query order, then further positives, then negatives; each with its query and its score.
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
    """An integer that identifies an input, see `content_key`. Files count as equal if their paths are: none is read."""
    return _number(content_key(item, by_reference))


def _rows(items: Sequence[EmbeddingInput], distinct: list[EmbeddingInput], merge_equal: bool) -> list[int]:
    """Appends what is new to `distinct`; returns where each item stands there."""
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
