"""Collates training examples into pairs of a query and a candidate, for rerankers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vlm2vec.batch import Batch
from vlm2vec.data.collate import key_number
from vlm2vec.data.examples import TrainExample
from vlm2vec.errors import UserError
from vlm2vec.types import EmbeddingInput

Pair = Callable[[EmbeddingInput, EmbeddingInput], EmbeddingInput]


@dataclass
class CandidateBatch:
    """The candidates of B queries as P model inputs, those of a query consecutive.

    Attributes:
        inputs: The pairs.
        is_positive: Whether each candidate is a positive of its query, shape [P].
        counts: Number of candidates of each query, shape [B].
        origins: File and row of each example, for messages, length B.
    """

    inputs: Batch
    is_positive: torch.Tensor
    counts: torch.Tensor
    origins: list[str]


def collate_candidates(
    process: Callable[[Sequence[EmbeddingInput]], Batch], pair: Pair, examples: Sequence[TrainExample], num: int
) -> CandidateBatch:
    """Builds the pairs of a batch of examples.

    The candidates of a query are its positives, then its own negatives, then targets of the next examples of the batch
    until there are `num`. Targets of equal queries, and targets that equal a positive, are no negatives.

    Args:
        process: The backbone's function that converts inputs to tensors.
        pair: Combines query and candidate to one input.
        examples: The examples of this rank.
        num: Number of candidates of a query; positives beyond it are kept.

    Raises:
        UserError: if a query has no negative.
    """
    positives_of: dict[int, set[int]] = {}
    for example in examples:
        keys = positives_of.setdefault(key_number(example.query), set())
        keys |= {key_number(target) for target in example.targets}
    items: list[EmbeddingInput] = []
    is_positive: list[bool] = []
    counts = []
    for place, example in enumerate(examples):
        positives = positives_of[key_number(example.query)]
        others = [*examples[place + 1 :], *examples[:place]]
        offered = [*example.negatives, *(other.target for other in others if not _same_document(example, other))]
        negatives = _distinct(offered, positives, max(num - len(example.targets), 1))
        if not negatives:
            raise UserError(
                f"{example.origin or example.source}: the query has no negative in its batch; add negatives to the "
                "data (vlm2vec mine), or raise train.batch_size"
            )
        candidates = [*example.targets, *negatives]
        items += [pair(example.query, candidate) for candidate in candidates]
        is_positive += [k < len(example.targets) for k in range(len(candidates))]
        counts.append(len(candidates))
    origins = [example.origin or example.source for example in examples]
    return CandidateBatch(process(items), torch.tensor(is_positive), torch.tensor(counts), origins)


def _same_document(one: TrainExample, other: TrainExample) -> bool:
    return one.target_id is not None and one.target_id == other.target_id


def _distinct(offered: Sequence[EmbeddingInput], excluded: set[int], num: int) -> list[EmbeddingInput]:
    """Returns the first `num` different inputs that are not excluded."""
    found: dict[int, EmbeddingInput] = {}
    for item in offered:
        if len(found) == num:
            break
        key = key_number(item)
        if key not in excluded:
            found.setdefault(key, item)
    return list(found.values())
