"""The contract of families with token states to pool.

Shapes: B examples, L tokens, D embedding dim.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError, shown
from vlm2vec.models.backbones import attention
from vlm2vec.models.backbones.base import Backbone
from vlm2vec.models.last_layer import by_token, last_token_only
from vlm2vec.models.pooling import JOIN, POOLINGS, pool
from vlm2vec.models.transformers_internals import causal_without_mask
from vlm2vec.types import EmbeddingInput


class DecoderBackbone(Backbone):
    """A family whose network returns a hidden state per token, of which pooling makes the vector."""

    _pooling: str = "last"
    _attention: str = "causal"

    @abstractmethod
    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Hidden states after the final norm, shape [B, L, D]."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """The pooled hidden states, not normalized, shape [B, `pooled_dim`]."""
        mask_BL, last_parts = batch["attention_mask"], self.last_parts() if self.pooling == "last" else []
        is_exact = self.attention == "causal" and not batch.left
        with last_token_only(last_parts, mask_BL), causal_without_mask(is_exact):
            hidden_BLD = self.hidden_states(batch)
        return pool(self.pooling, hidden_BLD, mask_BL)

    @property
    def pooled_dim(self) -> int:
        """Length of the pooled vectors: one hidden state for each pooling."""
        return self.embedding_dim * len(self.pooling.split(JOIN))

    @property
    def pooling(self) -> str:
        """Name of the pooling, a key of `POOLINGS`, or several joined by "+", whose vectors are concatenated."""
        return self._pooling

    @pooling.setter
    def pooling(self, name: str) -> None:
        if not set(name.split(JOIN)) <= set(POOLINGS):
            raise UserError(f"pooling {shown(name)}: expected one of {', '.join(POOLINGS)}, or several joined by +")
        self._pooling = name

    @property
    def attention(self) -> str:
        """Which tokens a token attends to, a value of `ATTENTIONS`.

        Setting it changes the network in place, before or after adapters are added.

        Raises:
            UserError: if the network cannot attend in both directions.
        """
        return self._attention

    @attention.setter
    def attention(self, name: str) -> None:
        if name not in attention.ATTENTIONS:
            raise UserError(f"attention {shown(name)}: expected one of {', '.join(attention.ATTENTIONS)}")
        if name == self._attention:
            return
        language = self.language_model
        if one_way := attention.layers_without_mask(language):
            raise UserError(f"attention {name}: {self.name} has layers of kind {', '.join(one_way)}; use causal")
        attention.set_causal(language, name == "causal")
        if name == "bidirectional" and not self._attends_to_all():
            attention.set_causal(language, True)
            raise UserError(f"attention {name}: the network of {self.name} stays causal; use causal")
        self._attention = name

    def _attends_to_all(self) -> bool:
        batch = self.process([EmbeddingInput(text="one two three")]).to(next(self.model.parameters()).device)
        return attention.first_token_reads_last(self, batch)

    def last_parts(self) -> list[nn.Module]:
        """Modules of the last layer that work on each token by itself, see `models/last_layer.py`."""
        layers: Any = getattr(self.language_model, "layers", ())
        return by_token(layers[-1]) if layers else []
