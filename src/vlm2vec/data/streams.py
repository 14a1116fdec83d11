"""Training sets that are read in blocks on demand: webdataset shards, parquet, JSON lines.

Only the sizes of a set's blocks (a row group or a few hundred records each) stay in memory. Pairs are addressed by
index, so the order depends only on the seed, not on the number of workers, and resuming needs no replay. The sampler
mixes a few blocks at a time, so that a block is rarely read twice.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Protocol, overload

from vlm2vec.data.examples import TrainExample
from vlm2vec.data.mmeb.training_sets import SETS, PageFile, PageSet, open_conversations, set_files
from vlm2vec.data.records import open_records, pair_of, record_files
from vlm2vec.errors import UserError

MMEB_FILES = ("original-", "diverse_instruction-")
WINDOW = 8
"""Number of blocks that are shuffled together; each data loader process keeps this many in memory."""


class StreamedSet(Sequence[TrainExample]):
    """A training set whose pairs are read block by block on demand.

    Args:
        path: A `.jsonl`, `.parquet` or `.tar` file of records, a folder of such files, or the data folder of a set
            listed in `training_sets.SETS`.
        name: Name of the set.
        chosen: Indices of the pairs that belong to the set, ascending; None: all pairs.
        use_negatives: Whether to keep the negatives of the records.
        target_instruction: Instruction for targets and negatives that have none; None: no instruction.
        reference_negative: Whether the query's images become a hard negative.

    Raises:
        UserError: if there are no pairs.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        chosen: Sequence[int] | None = None,
        use_negatives: bool = True,
        target_instruction: str | None = None,
        reference_negative: bool = False,
    ) -> None:
        self.path, self.name, self._chosen, self._use_negatives = path, name, chosen, use_negatives
        self._target_instruction, self._reference_negative = target_instruction, reference_negative
        files = set_files(path, name) if name in SETS else record_files(path)
        sizes = [(file, number, size) for file in files for number, size in enumerate(_open(file, name).sizes)]
        self._parts = [(str(file), number) for file, number, _ in sizes]
        self._ends = list(accumulate(size for _, _, size in sizes))
        if not self._ends or not self._ends[-1]:
            what = "files of this set" if name in SETS else ".jsonl, .parquet or .tar files"
            raise UserError(f"{path}: contains no records of {name}; expected {what}")

    @property
    def blocks(self) -> list[int]:
        """Number of pairs in each block, in order."""
        ends = self._ends if self._chosen is None else [bisect.bisect_left(self._chosen, end) for end in self._ends]
        return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    def only(self, chosen: Sequence[int]) -> StreamedSet:
        """Returns the subset with the given indices, ascending."""
        settings = (self._use_negatives, self._target_instruction, self._reference_negative)
        return StreamedSet(self.path, self.name, chosen, *settings)

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
        if self._reference_negative:
            example = example.with_reference_negative()
        return example.with_target_instruction(self._target_instruction) if self._target_instruction else example


def streamed_sets(root: Path) -> dict[str, Path]:
    """Returns the sets of a data folder that are read on demand, as name -> path for `StreamedSet`.

    These are files and folders of records, named without their ending, and the sets listed in `training_sets.SETS`.
    Folders in the MMEB-train layout are not included.
    """
    found = {name: root for name in SETS if set_files(root, name)}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        inside = record_files(path) if path.suffix in ("", ".jsonl", ".parquet", ".tar") else []
        if inside and not any(file.name.startswith(MMEB_FILES) for file in inside):
            found.setdefault(path.stem if path.is_file() else path.name, path)
    return found


class PairFile(Protocol):
    """A file of pairs in blocks.

    Attributes:
        sizes: Number of pairs in each block.
    """

    sizes: list[int]

    def read(self, number: int) -> list[TrainExample]:
        """Reads the pairs of a block; images are not read."""
        ...


class _RecordPairs:
    def __init__(self, file: Path, name: str) -> None:
        self._records, self._name = open_records(file), name
        self.sizes = self._records.sizes

    def read(self, number: int) -> list[TrainExample]:
        return [pair_of(record, self._name) for record in self._records.read(number)]


def _open(file: Path, name: str) -> PairFile:
    if name not in SETS:
        return _RecordPairs(file, name)
    return PageFile(file, name) if isinstance(SETS[name], PageSet) else open_conversations(file, name)


@lru_cache(maxsize=2 * WINDOW)
def _block(file: str, number: int, name: str, process_id: int) -> list[TrainExample]:
    return _opened(file, name, process_id).read(number)


@lru_cache(maxsize=WINDOW)
def _opened(file: str, name: str, process_id: int) -> PairFile:
    return _open(Path(file), name)
