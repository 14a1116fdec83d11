"""Describes the folder of a trained reranker.

`reranker.json` records the base, its settings and the prompt; `head.safetensors` the layer that gives the log-odds. The
other weights are an adapter or all weights, as in the folder of an embedding model.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from vlm2vec.models.reranking.scalar_head import HeadKind

HEAD_FILE = "head.safetensors"


class RerankerFile(BaseModel):
    """Content of `reranker.json`.

    Attributes:
        format: Version of this file.
        base: Built-in name, folder or hub id of the base weights.
        revision: Hub revision of the base.
        options: Settings of the family.
        attention: See `Backbone.attention`.
        pooling: See `Backbone.pooling`.
        adapter: Whether the weights are an adapter.
        trained_head: Whether the head is a trained layer; False: rows of the base's language-model head.
        head: Kind of the head, a key of `HEADS`.
        prompt: Attributes of `RerankPrompt`.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    base: str
    revision: str | None = None
    options: dict[str, Any] = {}
    attention: str = "causal"
    pooling: str = "last"
    adapter: bool
    trained_head: bool
    head: HeadKind = "linear"
    prompt: dict[str, Any]
