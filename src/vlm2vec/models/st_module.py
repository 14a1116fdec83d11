"""Wraps an `Embedder` as a sentence-transformers module, for folders that its own modules cannot compute.

`SentenceTransformer(folder, trust_remote_code=True)` finds the module by `modules.json`. Since version 6 the flag is
required for all classes outside sentence-transformers, even from installed packages; no code in the folder is run.
`sentence_transformer(folder)` creates the same object without the flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.models.embedder import Embedder
from vlm2vec.types import EmbeddingInput


class EmbedderModule(InputModule):
    """Computes unit-norm sentence embeddings.

    Args:
        embedder: The embedder.
    """

    modalities = ("text", "image", ("image", "text"), "message")  # the last also stands for a mixed batch
    save_in_root = True
    tokenizer: Any = None
    max_seq_length: int | None = None

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Returns a batch as a flat dict of tensors; the prompt is the instruction."""
        chat = bool(self.embedder.backbone.template.chat)
        items = [_of_messages(value, prompt, chat) or EmbeddingInput.of(value, prompt or None) for value in inputs]
        return self.embedder.backbone.process(items).features()

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` [B, D]."""
        features["sentence_embedding"] = self.embedder(Batch.of_features(features))
        return features

    def get_embedding_dimension(self) -> int:
        """Returns the length of the vectors."""
        return self.embedder.embedding_dim

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Writes the checkpoint files to the model's folder."""
        self.embedder.write_files(Path(output_path))

    @classmethod
    def load(cls, model_name_or_path: str, *_: Any, model_kwargs: dict[str, Any] | None = None, **__: Any) -> Self:
        """Loads a folder that `Embedder.save_pretrained` wrote; `dtype` of `model_kwargs` is used."""
        dtype: torch.dtype | None = (model_kwargs or {}).get("dtype")
        return cls(Embedder.from_pretrained(model_name_or_path, device="cpu", dtype=dtype))


def _of_messages(value: Any, prompt: str | None, chat: bool) -> EmbeddingInput | None:
    """Converts a chat (system turn: instruction; user turns: text and images) to an input; None for other values.

    Args:
        value: The value passed by the user.
        prompt: Instruction that precedes the system text of the chat.
        chat: Whether the model has a chat template, which can place text between images.
    """
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return None
    instruction = prompt or ""
    parts: list[tuple[str, Any]] = []
    for turn in turns:
        content = turn["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] not in ("text", "image"):
                raise UserError(f"a message with {part['type']}: expected text and images")
            if turn["role"] == "system":
                instruction += part["text"]
            else:
                parts.append((part["type"], part[part["type"]]))
    texts = [text for kind, text in parts if kind == "text"]
    images = [image for kind, image in parts if kind == "image"]
    if len(texts) > 1 or "text" in [kind for kind, _ in parts][1:-1]:
        if not chat:
            raise UserError("message with several texts or text between images: this model expects one text an input")
        counter = count(1)
        texts = ["".join(part if kind == "text" else f"<|image_{next(counter)}|>" for kind, part in parts)]
    ordered = {"text": texts[0] if texts else None, "images": images}
    first = bool(parts) and parts[0][0] == "text"
    return EmbeddingInput.of(ordered if first else dict(reversed(ordered.items())), instruction or None)


def sentence_transformer(folder: str | Path, dtype: torch.dtype | None = None) -> SentenceTransformer:
    """Loads any source of `Embedder.from_pretrained` as a sentence-transformers model, without trust_remote_code."""
    embedder = Embedder.from_pretrained(folder, dtype=dtype)
    model = SentenceTransformer(modules=[EmbedderModule(embedder)], device=str(embedder.device))
    model.prompts = {"query": "", "document": "", **embedder.prompts}
    return model
