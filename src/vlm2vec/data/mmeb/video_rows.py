"""Reads the rows of the video sets in their published file formats.

| format | sets |
|---|---|
| parquet, `data/test-*.parquet` | most |
| JSON lines, `data/test.jsonl` | HMDB51, UCF101, SmthSmthV2 |
| JSON, `*_test.json` | MSVD, DiDeMo |
| JSON or parquet, one file or folder per configuration | MVBench |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm2vec.data.mmeb.images import read_parquet
from vlm2vec.errors import UserError
from vlm2vec.media.text import read_text

Row = dict[str, Any]
FORMS = ("parquet", "jsonl", "json")
SPLITS = {"train": "train", "test": "test", "val": "val", "validation": "val", "dev": "val"}
NOT_ROWS = ("dataset_infos.json", "revisions.json")


def row_files(folder: Path, split: str | None = None) -> list[Path]:
    """Returns the files with a set's rows, in one format and, if the names contain splits, of one split.

    Args:
        folder: Folder of the set.
        split: Split to read, such as "test"; ignored if all files belong to the same split.

    Raises:
        UserError: if there are files of several splits but none of the requested split.
    """
    for form in FORMS:
        files = [*folder.glob(f"*.{form}"), *folder.glob(f"*/*.{form}")]
        files = sorted(file for file in files if file.name not in NOT_ROWS and not file.name.startswith("."))
        if files:
            return _of_split(files, split)
    return []


def form_of(files: list[Path]) -> str:
    """Describes the format and the names of a set's files."""
    if not files:
        return ""
    first = f"{files[0].parent.name}/{files[0].name}" if len({file.parent for file in files}) > 1 else files[0].name
    return f"{files[0].suffix[1:]}, {first}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def read_rows(files: list[Path]) -> Iterator[tuple[str, Row]]:
    """Yields each row with its location. Its `subset` is the configuration: the file name, or the folder for parquet.

    Raises:
        UserError: if a file is not readable or its rows are not objects.
    """
    for file in files:
        name = file.parent.name if file.suffix == ".parquet" else file.stem
        for where, row in _read(file):
            yield where, row if "subset" in row else {**row, "subset": name}


def _read(file: Path) -> Iterator[tuple[str, Row]]:
    if file.suffix == ".parquet":
        for number, row in enumerate(read_parquet(file).to_pylist()):
            yield f"{file}, row {number}", row
        return
    content = read_text(file)
    try:
        if file.suffix == ".json" and content.lstrip().startswith("["):
            numbered = list(enumerate(json.loads(content)))
        else:
            lines = enumerate(content.splitlines(), start=1)
            numbered = [(number, json.loads(line)) for number, line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON ({error}); download it again") from error
    for number, row in numbered:
        if not isinstance(row, dict):
            raise UserError(f"{file}, row {number}: expected an object of columns, found {type(row).__name__}")
        yield f"{file}, row {number}", row


def _of_split(files: list[Path], split: str | None) -> list[Path]:
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    wanted = SPLITS.get(str(split).split("_")[0])
    if wanted in by_split:
        return by_split[wanted]
    if len(by_split) > 1:
        raise UserError(f"{files[0].parent}: no rows of split {split}; found {', '.join(map(str, files))}")
    return files


def _split_of(file: Path) -> str | None:
    words = re.split(r"[^a-z]+", file.stem.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)
