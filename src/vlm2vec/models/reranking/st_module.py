"""Wraps a trained reranker as a sentence-transformers module.

`CrossEncoder(folder, trust_remote_code=True)` finds the module by `modules.json`; no code in the folder is run. Saved
folders name this class, so it must stay here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from sentence_transformers.base.modules import InputModule

from vlm2vec.batch import Batch
from vlm2vec.models.reranking.loading import load_pair_model
from vlm2vec.models.reranking.pair_model import PairModel
from vlm2vec.types import EmbeddingInput


class RerankerModule(InputModule):
    """Computes the log-odds of pairs; CrossEncoder turns them into probabilities.

    Args:
        model: The reranker.
    """

    modalities = ("text", "image", ("image", "text"), "message")  # the last also stands for a mixed batch
    save_in_root = True
    tokenizer: Any = None
    max_seq_length: int | None = None

    def __init__(self, model: PairModel) -> None:
        super().__init__()
        self.model = model

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Returns a batch of (query, candidate) as a flat dict of tensors; the prompt is the instruction."""
        pairs = [
            self.model.pair(EmbeddingInput.of(query, prompt or None), EmbeddingInput.of(candidate))
            for query, candidate in inputs
        ]
        return self.model.backbone.process(pairs).features()

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `scores`, the log-odds [B, 1]."""
        features["scores"] = self.model(Batch.of_features(features))
        return features

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Writes the reranker's files to the model's folder."""
        self.model.write_files(Path(output_path))

    @classmethod
    def load(cls, model_name_or_path: str, *_: Any, model_kwargs: dict[str, Any] | None = None, **__: Any) -> Self:
        """Loads a folder that `PairModel.write_files` wrote; `dtype` of `model_kwargs` is used."""
        dtype: torch.dtype | None = (model_kwargs or {}).get("dtype")
        return cls(load_pair_model(model_name_or_path, device="cpu", dtype=dtype))
