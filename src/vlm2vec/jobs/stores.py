"""The model of a vector store: recording it, loading it again, and refusing another one."""

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

# Entries of `describe` that change only the last bits of a vector: another machine or a newer library.
NOT_THE_MODEL = ("model", "device", "libraries")
# Settings by which the user consents to running code; they are never stored.
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
    """The facts that a store records about the model that fills it.

    Args:
        embedder: The model.
        model: Name or path from which it was loaded; the path of a folder is made absolute.
        options: Settings with which it was loaded.
        instruction: Instruction of the documents; None: the model's default, if it has one.
        precision: Storage precision of the vectors.
        dtype: Data type with which it was loaded; None: this machine's default. (A model's tensors may have several
            types, so it cannot be read from them.)
    """
    from vlm2vec.models.device import best_dtype
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
    """Loads the model that made a store's vectors.

    Args:
        store: The store, which names its model.
        model: Path from which to load it instead.
        settings: Arguments of `Embedder.from_pretrained` that override the recorded ones, such as the device.

    Raises:
        UserError: if the loaded model is another one.
    """
    import torch

    from vlm2vec.models.embedder import Embedder

    facts = store.facts
    source = model or facts.model
    kept = {"dtype": getattr(torch, facts.dtype) if facts.dtype else None, **facts.options}
    try:
        embedder = Embedder.from_pretrained(source, **(kept | (settings or {})))
    except TypeError as error:  # the family of another model may not have the store's settings
        raise UserError(f"{source}: does not support the settings of {facts.model}: {error}") from error
    loaded = facts_of(embedder, source, options=facts.options, instruction=facts.instruction, precision=facts.precision)
    facts.require_same_model(loaded, store.uri)
    return embedder


@contextmanager
def only_writer(store: VectorStore) -> Iterator[None]:
    """Locks a store in a local folder against a second writer; the lock ends with the process.

    The folder itself is locked, so no lock file is left behind. Qdrant's local mode has its own lock. A server or an
    object store accepts several writers: two runs may then do the same work twice.

    Raises:
        UserError: while another process writes to the store.
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
            raise UserError(f"{store.uri}: another process is writing to it; run again when it has finished") from error
        yield
    finally:
        os.close(folder)
