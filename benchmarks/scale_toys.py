"""What the measurements of scaling share: an encoder of random vectors, a store's facts and a table of texts."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec.retrieval.vector_store import StoreFacts
from vlm2vec.types import EmbeddingInput

BAD_EVERY = 1024  # inputs per unreadable one, for embed
Work = dict[str, Any]


class Hashed:
    """Embedder stub that derives a vector from the hash of the text."""

    def __init__(self, dim: int) -> None:
        self.dim, self.num_encoded = dim, 0

    def encode(self, inputs: Sequence[EmbeddingInput], **_: Any) -> np.ndarray:
        """Unit vectors [N, D]."""
        self.num_encoded += len(inputs)
        seeds = (hashlib.blake2b((item.text or "").encode(), digest_size=8).digest() for item in inputs)
        words = np.frombuffer(b"".join(seeds), np.uint64)[:, None]
        bits = (words * (2 * np.arange(1, self.dim + 1, dtype=np.uint64) + 1)) >> np.uint64(40)
        vectors_ND = bits.astype(np.float32) / np.float32(1 << 23) - 1
        vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        return vectors_ND

    encode_document = encode


def peak_mib() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def facts(dim: int) -> StoreFacts:
    """Returns a store's facts without a model."""
    return StoreFacts("random vectors", "0" * 16, dim, about={"weights": "none"})


def lines(folder: Path, rows: int, changed: int = 0) -> Path:
    """Writes a table of texts with an id; every `BAD_EVERY`th row has no text."""
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for row in range(rows):
            text = "" if row % BAD_EVERY == 7 else f"text {row}{' changed' if row < changed else ''}"
            file.write(json.dumps({"id": row, "text": text, "price": row / 8}) + "\n")
    return path
