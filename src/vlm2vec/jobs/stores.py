"""Which model made a store, and loading it again: vectors of two models must never meet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm2vec.errors import UserError
from vlm2vec.retrieval.embedding_cache import fingerprint
from vlm2vec.retrieval.vector_store import StoreFacts, VectorStore

if TYPE_CHECKING:
    import torch

    from vlm2vec.models.embedder import Embedder

# Of `describe`: what another machine or a newer library changes in a vector's last bits only.
NOT_THE_MODEL = ("model", "device", "libraries")
# Settings that are consent, to be given each time.
CONSENT = ("allow_pickle", "trust_remote_code")


def facts_of(
    embedder: Embedder,
    model: str,
    *,
    options: dict[str, Any] | None = None,
    instruction: str | None = None,
    precision: str = "float32",
    dtype: torch.dtype | None = None,
) -> StoreFacts:
    """What a store must know of the model that fills it.

    Args:
        embedder: As loaded.
        model: What loaded it; a folder's path is made absolute.
        options: Settings that it was loaded with.
        instruction: Of the documents; None: the model's own, if it has one.
        precision: In which vectors are kept.
        dtype: With which it was loaded; None: this machine's default. (A model's tensors may be of several types, so
            it cannot be read off them.)
    """
    from vlm2vec.models.embedder import best_dtype
    from vlm2vec.models.verification.fingerprint import describe

    about = {name: value for name, value in describe(embedder, model).items() if name not in NOT_THE_MODEL}
    return StoreFacts(
        model=str(Path(model).resolve()) if Path(model).exists() else model,
        fingerprint=fingerprint(about),
        dim=embedder.embedding_dim,
        precision=precision,
        instruction=instruction or embedder.prompts.get("document"),
        dtype=str(dtype or best_dtype(embedder.device)).removeprefix("torch."),
        options={name: value for name, value in (options or {}).items() if name not in CONSENT},
        about=about,
    )


def load_model_of(store: VectorStore, model: str | None = None, settings: dict[str, Any] | None = None) -> Embedder:
    """The model whose vectors a store holds.

    Args:
        store: Names its model.
        model: Where to load it from instead.
        settings: Of `Embedder.from_pretrained`, over those that the store remembers: consent, device and the like.

    Raises:
        UserError: if what was loaded is another model.
    """
    import torch

    from vlm2vec.models.embedder import Embedder

    facts = store.facts
    source = model or facts.model
    kept = {"dtype": getattr(torch, facts.dtype) if facts.dtype else None, **facts.options}
    try:
        embedder = Embedder.from_pretrained(source, **(kept | (settings or {})))
    except TypeError as error:  # the family of another model may not have the store's settings
        raise UserError(f"{source}: does not take the settings of {facts.model}: {error}") from error
    loaded = facts_of(embedder, source, options=facts.options, instruction=facts.instruction, precision=facts.precision)
    facts.require_same_model(loaded, store.uri)
    return embedder


@contextmanager
def only_writer(store: VectorStore) -> Iterator[None]:
    """Holds a store in a folder of this machine against a second writer; a process that dies lets it go.

    The folder itself is locked, so nothing is left beside it. Qdrant's local mode locks its folder, and a server or an
    object store takes the writers one by one: there, two runs may do the same work twice.

    Raises:
        UserError: while another process indexes into the store.
    """
    import fcntl

    if not Path(store.uri).is_dir():
        yield
        return
    folder = os.open(store.uri, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{store.uri}: another process is indexing into it; run again when it has ended") from error
        yield
    finally:
        os.close(folder)
