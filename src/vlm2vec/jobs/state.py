"""The rows that a vector store has, by which the next run of `vlm2vec index` recognises what is up to date."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from vlm2vec.retrieval.metadata import own
from vlm2vec.retrieval.vector_store import VectorStore

STATE = tuple(own(source="", version="", digest="", pages="", frames=""))
"""Fields by which the next run recognises a row."""


class Known(NamedTuple):
    """What the store knows of a row; `siblings` is the number of rows that its file gave (pages or frames)."""

    source: str
    version: str
    digest: str | None
    siblings: int


class StoreState:
    """Every row of a store by key, and the rows of each file.

    Args:
        store: All its rows are read, without vectors.
    """

    def __init__(self, store: VectorStore) -> None:
        self.rows: dict[str, Known] = {}
        self._of_file: dict[str, list[str]] = {}
        names: dict[str, str] = {}  # one object per source, not one per row
        for rows in store.scan(STATE):
            for key, one in zip(rows.keys, rows.metadata, strict=True):
                source, version, digest, pages, frames = (one.get(name) for name in STATE)
                source = names.setdefault(source or "", source or "")
                self.rows[key] = Known(source, version or "", digest, int(pages or frames or 0))
                if pages or frames:
                    self._of_file.setdefault(key.rpartition("#")[0], []).append(key)

    def complete(self, file_key: str, source: str, version: str) -> list[str]:
        """Returns the keys of a file's rows if all of them are up to date; otherwise an empty list."""
        keys = [file_key] if file_key in self.rows else self._of_file.get(file_key, [])
        rows = [self.rows[key] for key in keys]
        same = all((row.source, row.version) == (source, version) for row in rows)
        return keys if same and rows and len(rows) == max(rows[0].siblings, 1) else []

    def by_source(self) -> Counter[str]:
        """Number of rows of each source."""
        return Counter(row.source for row in self.rows.values())
