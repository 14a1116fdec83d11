"""vlm2vec: turn a vision-language model into an embedding model for text and images.

>>> from vlm2vec import Embedder, sample_photographs
>>> embedder = Embedder.from_pretrained("compact")
>>> photographs = sample_photographs()  # twelve photographs that ship with the package
>>> scores = embedder.similarity(embedder.encode_query(["people in a boat"]), embedder.encode_document(photographs))
>>> photographs[int(scores.argmax())].name
'canoes.jpg'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm2vec.errors import UserError
from vlm2vec.media.samples import sample_photographs
from vlm2vec.types import EmbeddingInput

if TYPE_CHECKING:
    from vlm2vec.models.embedder import Embedder
    from vlm2vec.models.reranking.reranker import Reranker

__all__ = ["Embedder", "EmbeddingInput", "Reranker", "UserError", "__version__", "sample_photographs"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # These need torch, which takes seconds to import, and `vlm2vec --help` does not need it.
    if name == "Embedder":
        from vlm2vec.models.embedder import Embedder

        return Embedder
    if name == "Reranker":
        from vlm2vec.models.reranking.reranker import Reranker

        return Reranker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
