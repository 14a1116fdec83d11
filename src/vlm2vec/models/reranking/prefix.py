"""Computes the part of the prompts that all candidates of a query share once: its keys and values are reused.

In a causal model the states of the first tokens do not depend on later ones. Prompts of one query are equal up to the
candidate: system turn, instruction, the query's text and images.

Shapes: B pairs, L tokens, P tokens that all prompts share, S = L - P tokens after them, D hidden size, H heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import DynamicCache

from vlm2vec.batch import Batch
from vlm2vec.models.backbones.base import Backbone
from vlm2vec.models.backbones.generic import Generic
from vlm2vec.models.last_layer import last_token_only
from vlm2vec.models.pooling import last_token
from vlm2vec.models.reranking.pair_model import PairModel
from vlm2vec.models.reranking.scalar_head import ProductHead
from vlm2vec.models.transformers_internals import door
from vlm2vec.types import EmbeddingInput

BY_TOKEN = {"input_ids", "attention_mask", "position_ids", "mm_token_type_ids"}
"""Token tensors of families whose tokens attend to all tokens before them and to no others."""
LEAST = 8  # fewer shared tokens are not worth a pass of their own


class SharedPrefix:
    """A `PairModel` for the candidates of one query, for the encoding pipeline.

    Computed whole are batches that share too little, families that keep more than keys and values of each layer, and
    models whose head reads a state of the prefix.

    Args:
        model: Scores the pairs.
        query: The query of all pairs.

    Attributes:
        num_shared: Number of pairs that reused the prefix.
    """

    def __init__(self, model: PairModel, query: EmbeddingInput) -> None:
        self.num_shared = 0
        self._model, self._query = model, query
        self._alone: Batch | None = None
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def training(self) -> bool:
        """As of the model."""
        return self._model.training

    @property
    def backbone(self) -> Backbone:
        """As of the model."""
        return self._model.backbone

    @property
    def device(self) -> torch.device:
        """As of the model."""
        return self._model.device

    @property
    def embedding_dim(self) -> int:
        """As of the model."""
        return self._model.embedding_dim

    def train(self, mode: bool = True) -> Any:
        """As of the model."""
        return self._model.train(mode)

    def eval(self) -> Any:
        """As of the model."""
        return self._model.eval()

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Log-odds of a batch of pairs, [B, 1] in float32."""
        backbone = self._model.backbone
        head = self._model.head
        if isinstance(head, ProductHead) or not isinstance(backbone, Generic) or not is_supported(backbone, batch):
            return self._model(batch)  # type: ignore[no-any-return]
        if self._alone is None:  # not earlier: the pipeline may have changed how pixel values are sent
            nothing = self._model.pair(self._query, EmbeddingInput(text=""))
            self._alone = backbone.process([nothing]).to(self._model.device)
        num = shared_length(self._alone, batch)
        if self._kept:
            num = min(num, self._kept[0][0].shape[2])
        rest = after_prefix(self._alone, batch, num) if num >= LEAST else None
        if rest is None:
            return self._model(batch)  # type: ignore[no-any-return]
        if not self._kept:
            inputs = backbone.model_inputs(first_tokens(self._alone, num))
            cache = backbone.model(**inputs, use_cache=True).past_key_values
            self._kept = [(keys, values) for keys, values, *_ in cache]
        self.num_shared += len(batch)
        return head(self._states(backbone, rest, num, batch["attention_mask"]))  # type: ignore[no-any-return]

    def _states(self, backbone: Generic, rest: Batch, num: int, mask_BL: torch.Tensor) -> torch.Tensor:
        """States of the last tokens, [B, D], given keys and values [1, H, P, ..] of each layer."""
        repeated = [tuple(part[:, :, :num].expand(len(mask_BL), -1, -1, -1) for part in layer) for layer in self._kept]
        inputs = {**backbone.model_inputs(rest), "attention_mask": mask_BL}
        with last_token_only(backbone.last_parts(), rest["attention_mask"]):
            output = backbone.model(**inputs, past_key_values=DynamicCache(repeated), use_cache=True)
        return last_token(output.last_hidden_state, rest["attention_mask"])


def is_supported(backbone: Generic, batch: Batch) -> bool:
    """Whether a token's state in this family depends on the tokens before it only, by keys and values of all of them.

    False with a sliding window or a recurrent state in some layer, and if images attend to later tokens.
    """
    if backbone.attention != "causal" or backbone.pooling != "last" or batch.left:
        return False
    by_token = set(batch.tensors) - set(batch.rows)
    layers = DynamicCache(config=backbone.config).layers
    plain = door("transformers.cache_utils.DynamicLayer")
    return by_token <= BY_TOKEN and "past_key_values" in backbone.accepted and all(type(x) is plain for x in layers)


def shared_length(alone: Batch, batch: Batch) -> int:
    """Number of first tokens that all prompts share with that of the query alone; each keeps a token after them."""
    ids_L, ids_BL = alone["input_ids"][0], batch["input_ids"]
    most = min(len(ids_L), int(batch["attention_mask"].sum(dim=1).min()) - 1)
    is_equal_P = (ids_BL[:, :most] == ids_L[:most]).all(dim=0)
    return int(is_equal_P.long().cumprod(dim=0).sum())


def first_tokens(alone: Batch, num: int) -> Batch:
    """The prompt of the query alone, cut after `num` tokens, with all of its images."""
    tensors = {name: tensor if name in alone.rows else tensor[:, :num] for name, tensor in alone.tensors.items()}
    return dataclasses.replace(alone, tensors=tensors)


def after_prefix(alone: Batch, batch: Batch, num: int) -> Batch | None:
    """The tokens after the first `num`, without the query's images.

    None if the first images of a pair are not processed as those of the query alone: some families look at how many
    images an input has.
    """
    tensors, rows = {}, dict(batch.rows)
    for name, tensor in batch.tensors.items():
        if name not in batch.rows:
            tensors[name] = tensor[:, num:]
            continue
        counts = batch.rows[name].tolist()
        first = alone.get(name)
        size = 0 if first is None else len(first)
        parts = torch.split(tensor, counts)
        if first is not None and not all(_begins_with(part, first) for part in parts):
            return None
        tensors[name] = torch.cat([part[size:] for part in parts])
        rows[name] = batch.rows[name] - size
    return None if set(alone.rows) - set(rows) else dataclasses.replace(batch, tensors=tensors, rows=rows)


def _begins_with(part: torch.Tensor, first: torch.Tensor) -> bool:
    return part.shape[1:] == first.shape[1:] and torch.equal(part[: len(first)], first)
