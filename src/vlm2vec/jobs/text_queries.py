"""Text queries without loading the whole model: the built-in model's text side, kept on the first index or search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlm2vec.cache import cache_folder
from vlm2vec.models.checkpoints.replaced import refuse_replaced
from vlm2vec.retrieval.vector_store import StoreFacts

if TYPE_CHECKING:
    from vlm2vec.models.backbones.compact.text_only import TextSide
    from vlm2vec.models.embedder import Embedder

FOLDER = "text-queries"


def text_side_of(facts: StoreFacts) -> TextSide | None:
    """What encodes texts as the store's model does, if `keep_text_side` has written it on this machine.

    Raises:
        UserError: if the store's model was replaced; the text side of an older version may still be here.
    """
    from vlm2vec.models.backbones.compact.text_only import TextSide

    refuse_replaced(facts.model)
    folder = _folder(facts)
    return TextSide(folder) if folder.is_dir() else None


def keep_text_side(embedder: Embedder, facts: StoreFacts) -> None:
    """Writes the text side of the built-in model into the user's cache folder, once for each fingerprint.

    Other models are left out: their text side is not a part, or it is as large as the model.
    """
    from vlm2vec.models.backbones.compact.model import Compact
    from vlm2vec.models.backbones.compact.text_only import save_text_side
    from vlm2vec.models.checkpoints.folder import write_folder

    folder = _folder(facts)
    if facts.model != Compact.name or folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(folder, lambda beside: save_text_side(embedder, beside))


def _folder(facts: StoreFacts) -> Path:
    return cache_folder() / FOLDER / facts.fingerprint
