"""`mllama`: Llama 3.2 Vision, whose text layers look at pictures by cross attention instead of reading their tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from vlm2vec.models.backbones.generic import Generic
from vlm2vec.types import Batch


class Mllama(Generic):
    """As `Generic`; its picture tensors have a place for every example of a batch, empty for those without pictures."""

    name: ClassVar[str] = "mllama"

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Final-norm hidden states [B, L, D]."""
        tensors = {name: batch[name] for name in batch.tensors if name not in (*batch.rows, "cross_attention_mask")}
        if any(len(batch[name]) for name in batch.rows):
            tensors["cross_attention_mask"] = batch["cross_attention_mask"]
            for name, counts in batch.rows.items():
                given = batch[name]
                spread = given.new_zeros(len(batch), *given.shape[1:])
                tensors[name] = spread.index_copy(0, counts.to(given.device).nonzero().squeeze(1), given)
        return super().hidden_states(Batch(tensors, {}, batch.padded))
