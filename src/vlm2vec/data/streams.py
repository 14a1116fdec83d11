"""Training sets that stay where they are: webdataset shards, parquet, JSON lines, a few blocks of them in memory.

What is held of a set is the size of its blocks (a row group, or some hundred records). So a pair can be asked for by
its number, which keeps the order a function of the seed, whatever the number of workers, and makes resuming free; the
sampler mixes a few blocks at a time, so that few are read again.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import overload

from vlm2vec.data.examples import TrainExample
from vlm2vec.data.records import RecordFile, open_records, pair_of, record_files
from vlm2vec.errors import UserError

MMEB_FILES = ("original-", "diverse_instruction-")
WINDOW = 8
"""Blocks that are mixed with each other, and kept by each reading process."""


class StreamedSet(Sequence[TrainExample]):
    """The pairs of a `.jsonl`, `.parquet` or `.tar` file, or of a folder of them, read when they are asked for.

    Args:
        path: The file or folder.
        name: Of the set.
        chosen: Numbers of the pairs that belong to it, ascending; None: all.
        use_negatives: Whether the records' negatives are kept.
        target_instruction: Put on targets and negatives that have no instruction of their own; None: none.

    Raises:
        UserError: if nothing is there.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        chosen: Sequence[int] | None = None,
        use_negatives: bool = True,
        target_instruction: str | None = None,
    ) -> None:
        self.path, self.name, self._chosen, self._use_negatives = path, name, chosen, use_negatives
        self._target_instruction = target_instruction
        files = record_files(path)
        parts = [(file, number, size) for file in files for number, size in enumerate(open_records(file).sizes)]
        self._parts = [(str(file), number) for file, number, _ in parts]
        self._ends = list(accumulate(size for _, _, size in parts))
        if not self._ends or not self._ends[-1]:
            raise UserError(f"{path}: no records there; expected .jsonl, .parquet or .tar files")

    @property
    def blocks(self) -> list[int]:
        """Pairs of each block, in order; their sum is the length."""
        ends = self._ends if self._chosen is None else [bisect.bisect_left(self._chosen, end) for end in self._ends]
        return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    def only(self, chosen: Sequence[int]) -> StreamedSet:
        """The set of some of its pairs, by ascending number."""
        return StreamedSet(self.path, self.name, chosen, self._use_negatives, self._target_instruction)

    def __len__(self) -> int:
        return self._ends[-1] if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> TrainExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TrainExample]: ...
    def __getitem__(self, index: int | slice) -> TrainExample | list[TrainExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = index if self._chosen is None else self._chosen[index]
        part = bisect.bisect_right(self._ends, number)
        begin = self._ends[part - 1] if part else 0
        example = _block(*self._parts[part], self.name, os.getpid())[number - begin]
        if not self._use_negatives:
            example = example.without_negatives()
        return example.with_target_instruction(self._target_instruction) if self._target_instruction else example


def streamed_sets(root: Path) -> dict[str, Path]:
    """The sets of records in a data folder: files and folders of files, by name without ending.

    A folder in the MMEB-train layout is none.
    """
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        inside = record_files(path) if path.suffix in ("", ".jsonl", ".parquet", ".tar") else []
        if inside and not any(file.name.startswith(MMEB_FILES) for file in inside):
            found[path.stem if path.is_file() else path.name] = path
    return found


@lru_cache(maxsize=2 * WINDOW)
def _block(file: str, number: int, source: str, process_id: int) -> list[TrainExample]:
    return [pair_of(record, source) for record in _opened(file, process_id).read(number)]


@lru_cache(maxsize=WINDOW)
def _opened(file: str, process_id: int) -> RecordFile:
    return open_records(Path(file))
