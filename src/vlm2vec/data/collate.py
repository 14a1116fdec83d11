"""Pairs -> the tensors of a step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vlm2vec.types import Batch, EmbeddingInput, TrainExample


@dataclass
class PairBatch:
    """B pairs, ready for a model.

    Attributes:
        query: B queries.
        target: M >= B targets: the positives in query order, then all negatives.
        target_keys: One integer a target; equal integers mean equal inputs, shape [M].
    """

    query: Batch
    target: Batch
    target_keys: torch.Tensor


def collate_pairs(process: Callable[[Sequence[EmbeddingInput]], Batch], examples: Sequence[TrainExample]) -> PairBatch:
    """The batch of these pairs, made by a backbone's processor."""
    negatives = [negative for example in examples for negative in example.negatives]
    targets = [example.target for example in examples] + negatives
    keys = torch.tensor([_key(target) for target in targets])
    return PairBatch(process([example.query for example in examples]), process(targets), keys)


def _key(item: EmbeddingInput) -> int:
    content = repr((item.text, item.instruction, [(i.path, i.member, i.data) for i in item.images]))
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=7).digest())
