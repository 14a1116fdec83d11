"""A toy encoder that recognizes colours, for the tests of vector stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from samples import COLORS

from vlm2vec.errors import UserError
from vlm2vec.types import EmbeddingInput


class ColourEncoder:
    """Mean colour of an image, the colour that a text names, or the two as lights; counts what it encodes."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.num_encoded = 0
        self.fail_after = fail_after

    def encode(self, inputs: Sequence[EmbeddingInput], **kwargs: Any) -> np.ndarray:
        if self.fail_after is not None and self.num_encoded >= self.fail_after:
            raise KeyboardInterrupt
        rows = np.zeros((len(inputs), 3), np.float32)
        for position, item in enumerate(inputs):
            try:
                rows[position] = self._vector(item)
            except UserError as error:
                if "on_error" not in kwargs:
                    raise
                kwargs["on_error"](position, error)
            else:
                self.num_encoded += 1
        return rows

    encode_query = encode_document = encode

    def _vector(self, item: EmbeddingInput) -> np.ndarray:
        parts = [np.asarray(image.load(), np.float32).mean((0, 1)) for image in item.images]
        parts += [np.array(COLORS[word], np.float32) for word in (item.text or "").split() if word in COLORS]
        light = np.max(parts, axis=0) - 110  # red and green together are yellow
        return (light / np.linalg.norm(light)).astype(np.float32)
