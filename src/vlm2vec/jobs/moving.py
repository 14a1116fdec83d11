"""Rows of a source that was deleted or moved: removing them, or giving them their new paths without encoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm2vec.errors import UserError
from vlm2vec.jobs.indexing import source_name
from vlm2vec.jobs.state import StoreState
from vlm2vec.retrieval.metadata import own
from vlm2vec.retrieval.vector_store import VectorStore

SOURCE, PATH = own(source="", path="")


def forget(store: VectorStore, source: str) -> int:
    """Removes the rows of a source, or of a folder or file below one, from a store; no file is deleted.

    Args:
        store: The store.
        source: Path of a source, folder or file, which need not exist any more.

    Returns:
        Number of rows removed.

    Raises:
        UserError: if the path is empty, or the store has no row of it.
    """
    names = _names(source)
    gone: list[str] = []
    for rows in store.scan([SOURCE, PATH]):
        for key, one in zip(rows.keys, rows.metadata, strict=True):
            if any(_below(str(one.get(field) or ""), name) for field in (SOURCE, PATH) for name in names):
                gone.append(key)
    if not gone:
        raise _unknown(store, source)
    store.delete(gone)
    return len(gone)


def relocate(store: VectorStore, old: str, new: str, progress: Callable[[int], None] = lambda done: None) -> int:
    """Changes the path of a source, and of its rows, after its files were moved; nothing is read or encoded.

    A killed run is completed by a second one: a row appears under its new key before its old key is removed.

    Args:
        store: The store.
        old: Earlier path of a source, or of a folder with several sources.
        new: Its path now.
        progress: Called with the number of rows moved since the last call.

    Returns:
        Number of rows moved.

    Raises:
        UserError: if the store has no such source, or it is at this path already.
    """
    if source_name(Path(old)) == source_name(Path(new)):
        raise UserError(f"{old}: the old and the new path are the same ({source_name(Path(new))})")
    target, fields, moved = source_name(Path(new)), list(store.fields()), 0
    for rows in store.scan(fields, vectors=True):
        for name in _names(old):
            places = [i for i, one in enumerate(rows.metadata) if _below(str(one.get(SOURCE) or ""), name)]
            if not places or rows.vectors_ND is None or name == target:
                continue
            keys = [rows.keys[i] for i in places]
            metadata = [_moved(rows.metadata[i], name, target) for i in places]
            store.upsert([_replaced(key, name, target) for key in keys], rows.vectors_ND[places], metadata)
            store.delete(keys)
            moved += len(keys)
            progress(len(keys))
            break
    if not moved:
        raise _unknown(store, old)
    return moved


def _names(path: str) -> list[str]:
    """The names that a path may have in a store: as it is on this machine, and as typed (of another machine).

    Raises:
        UserError: for an empty path, as from a variable of a script that is not set; it would be the current folder.
    """
    if not path.strip():
        raise UserError("the path of the source is empty; expected a folder or file that was indexed")
    return list(dict.fromkeys([source_name(Path(path)), path.rstrip("/") or "/"]))


def _below(text: str, name: str) -> bool:
    """Whether a path or key is a name, a file below it, or a part (page, row) of it."""
    return text == name or text.startswith((f"{name}/", f"{name}#"))


def _replaced(text: str, old: str, new: str) -> str:
    return new + text[len(old) :] if _below(text, old) else text


def _moved(metadata: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    changed = {field: _replaced(str(metadata[field]), old, new) for field in (SOURCE, PATH) if metadata.get(field)}
    return {**metadata, **changed}


def _unknown(store: VectorStore, source: str) -> UserError:
    known = [f"{name} ({count:,} rows)" for name, count in StoreState(store).by_source().most_common(5) if name]
    return UserError(f"{source}: {store.uri} has no rows of it; its sources are: {', '.join(known) or 'none'}")
