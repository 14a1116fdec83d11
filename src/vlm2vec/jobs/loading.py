"""Takes a folder of parts that `vlm2vec embed` made into a vector store, of which no second copy is written.

The rows are committed in groups, and rows whose key the store has already are left out, so a killed run continues.

Shapes: N rows, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from vlm2vec.errors import UserError
from vlm2vec.jobs.parts import NAMES, facts_of_part, rows_of
from vlm2vec.jobs.stores import only_writer
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import IndexFacts, VectorStore

ROWS_A_COMMIT = 1 << 14  # the cost of a commit of LanceDB grows with the number of commits before it


@dataclass(frozen=True)
class LoadReport:
    """Result of a run.

    Attributes:
        num_new: Rows added.
        num_known: Rows left out, because the store has their keys.
        num_rows: Rows in the store.
        index: How the store is searched now.
    """

    num_new: int
    num_known: int
    num_rows: int
    index: IndexFacts


def part_files(folder: Path) -> list[Path]:
    """The parts in a folder, in order.

    Raises:
        UserError: if there is none.
    """
    files = sorted(folder.glob(NAMES))
    if not files:
        raise UserError(
            f"{folder}: no part-*.parquet here; make the folder with: vlm2vec embed MODEL INPUT -o {folder}"
        )
    return files


def count_rows(folder: Path) -> int:
    """Number of rows of all parts in a folder."""
    return sum(pq.read_metadata(file).num_rows for file in part_files(folder))


def load_parts(
    folder: Path, uri: str, index: str | None = None, progress: Callable[[int], None] = lambda done: None
) -> LoadReport:
    """Adds the rows of all parts to a store, which is created if it is absent.

    Memory holds `ROWS_A_COMMIT` rows, and the keys of the store.

    Args:
        folder: Output of `vlm2vec embed` with a name without an ending.
        uri: As for `open_store`.
        index: Kind of index; None: chosen by the number of rows.
        progress: Called with the number of rows done since the last call.

    Raises:
        UserError: for a folder without parts, or a store of another model.
    """
    files = part_files(folder)
    facts = facts_of_part(files[0])
    store = open_store(uri, create=facts)
    try:
        with only_writer(store):
            rows = _NewRows(store)
            unread = not rows.seen
            for file in files:
                progress(rows.add(*rows_of(file, facts.dim)))
            rows.commit()
            chosen = store.build_index(index, unread=unread)
        return LoadReport(rows.num_new, rows.num_known, store.count(), chosen)
    finally:
        store.close()


class _NewRows:
    """Rows that wait for one commit; rows of known keys are left out."""

    def __init__(self, store: VectorStore) -> None:
        self.store, self.num_new, self.num_known = store, 0, 0
        self.seen = {key for rows in store.scan([]) for key in rows.keys}
        self._begin()

    def _begin(self) -> None:
        self.keys: list[str] = []
        self.vectors: list[np.ndarray] = []
        self.metadata: list[dict[str, Any]] = []

    def add(self, keys: list[str], vectors_ND: np.ndarray, metadata: list[dict[str, Any]]) -> int:
        """Takes the rows of a part, commits if they are enough, and returns the number of its rows."""
        places = []
        for place, key in enumerate(keys):
            if key not in self.seen:
                self.seen.add(key)
                places.append(place)
        self.num_known += len(keys) - len(places)
        self.keys += [keys[place] for place in places]
        self.metadata += [metadata[place] for place in places]
        self.vectors.append(vectors_ND[places])
        if len(self.keys) >= ROWS_A_COMMIT:
            self.commit()
        return len(keys)

    def commit(self) -> None:
        """Writes the rows that wait."""
        if self.keys:
            self.store.add(self.keys, np.concatenate(self.vectors), self.metadata)
        self.num_new += len(self.keys)
        self._begin()
