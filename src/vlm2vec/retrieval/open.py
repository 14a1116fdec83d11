"""Opens a vector store by its address: LanceDB or Qdrant."""

from __future__ import annotations

from vlm2vec.errors import UserError, shown
from vlm2vec.retrieval.vector_store import LANCE_ENDING, PRECISIONS, QDRANT_SCHEME, StoreFacts, VectorStore


def open_store(uri: str, create: StoreFacts | None = None) -> VectorStore:
    """Opens a vector store, or creates it.

    Args:
        uri: `photos.lance` (a folder; also `s3://…/photos.lance`), `qdrant://host:port/collection`, or Qdrant without
            a server: `qdrant:///folder/collection` and, in memory, `qdrant://:memory:/collection`.
        create: Facts of the vectors to be written: an absent store is created, an existing one must have been made by
            the same model. None: the store must exist.

    Raises:
        UserError: for an address of another form, an absent store, or a store of another model.
    """
    if create is not None and create.precision not in PRECISIONS:
        raise UserError(f"precision {shown(create.precision)}: expected {' or '.join(PRECISIONS)}")
    if uri.startswith(QDRANT_SCHEME):
        from vlm2vec.retrieval.qdrant_store import open_qdrant

        store: VectorStore = open_qdrant(uri, create)
    elif uri.rstrip("/").endswith(LANCE_ENDING):
        from vlm2vec.retrieval.lance_store import open_lance

        store = open_lance(uri.rstrip("/"), create)
    else:
        raise UserError(f"store {uri}: expected FOLDER.lance or qdrant://host:port/collection")
    if create is not None:
        try:
            store.facts.require_same_model(create, uri)
        except UserError:
            store.close()
            raise
    return store
