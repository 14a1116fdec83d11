"""vlm2vec: any vision-language model as one embedding model for text, images and both."""

from __future__ import annotations

from typing import Any

from vlm2vec.errors import UserError
from vlm2vec.types import EmbeddingInput

__all__ = ["Embedder", "EmbeddingInput", "UserError", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Embedder needs torch, which takes seconds to import: `vlm2vec --help` must not wait for it.
    if name == "Embedder":
        from vlm2vec.models.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
