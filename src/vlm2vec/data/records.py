"""Reads user-provided training pairs and evaluation queries: JSON lines, parquet with images, webdataset shards.

A record has `query`, and `target` (training) or `candidates` (evaluation). Each of these is a text or an object with
some of `text`, `image` or `images`, `video` and `instruction`. Further fields for training: `negatives` (a list),
`targets` (a list of positives, instead of `target`), `target_scores` and `negative_scores` (a number for each target
and negative, such as the score of a reranker), `target_instruction` (for targets and negatives without their own).
Further fields for evaluation: `relevant` (positions among the candidates, default [0]) and `gains`.

- JSON lines: images and videos are paths relative to the file. A video is a file, a folder of frames, or a list of
  images.
- Parquet: flat columns (`query_text`, `query_image`, `target_text`, `target_image`); image cells contain bytes or the
  hub's Image type.
- Webdataset shards: a record consists of the files with the same key, `KEY.json` and the images that it names by their
  ending (`"image": "query.jpg"` is `KEY.query.jpg`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vlm2vec.data.examples import TrainExample
from vlm2vec.data.json_lines import JsonLines, json_object
from vlm2vec.errors import UserError, did_you_mean, shown
from vlm2vec.media import archives
from vlm2vec.media.cells import columns_to_read, image_columns, images_of_rows, open_parquet, parquet_errors, plain_rows
from vlm2vec.media.images import ImageRef, image_beside, named_images
from vlm2vec.media.text import decode, require_unicode
from vlm2vec.media.videos import VideoRef
from vlm2vec.types import EmbeddingInput, EvalQuery

ENDINGS = (".jsonl", ".parquet", ".tar")
BLOCK = 256  # records per block in formats without row groups
SIDE_FIELDS = {"text", "image", "images", "video", "instruction"}
FIELDS = {"query", "target", "candidates", "negatives", "relevant", "gains"}
FIELDS |= {"targets", "target_scores", "negative_scores", "target_instruction"}
PARTS = ("text", "image", "images", "instruction")
FLAT = tuple(f"{side}_{part}" for side in ("query", "target", "negative") for part in PARTS)


@dataclass(frozen=True)
class Record:
    """A record with the file that its images are resolved against."""

    values: dict[str, Any]
    where: str
    place: Path
    """The JSON lines file, parquet file or shard."""
    key: str = ""
    """Key of a webdataset record."""

    def image(self, name: Any, origin: str) -> ImageRef:
        """Returns a reference to an image that the record names."""
        if isinstance(name, ImageRef):
            return name
        if not isinstance(name, str) or not name:
            raise UserError(f"{origin}: expected an image path, found {shown(name)}")
        if self.key:
            return ImageRef(path=str(self.place), member=f"{self.key}.{name}", origin=origin)
        try:
            return image_beside(self.place, name, origin)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error

    def video(self, name: Any, origin: str) -> VideoRef:
        """Returns a reference to a video that the record names: a file, a folder of frames, or a list of images."""
        if isinstance(name, list) and name:
            return VideoRef(frames=tuple(self.image(frame, origin) for frame in name), origin=origin)
        if not isinstance(name, str) or not name:
            raise UserError(f"{origin}: expected a video path or a list of frames, found {shown(name)}")
        if self.key:
            raise UserError(
                f"{origin}: video files inside shards are unsupported; list the frames, as in video: [0.jpg, 1.jpg]"
            )
        return VideoRef(path=str(self.place.parent / name), origin=origin)


def read_train_records(path: Path) -> list[TrainExample]:
    """Reads training pairs from a `.jsonl`, `.parquet` or `.tar` file, or from all such files in a folder.

    Raises:
        UserError: if a record is not a valid pair; the message names file, row and field.
    """
    return [pair_of(record, path.stem) for record in _records(path)]


def pair_of(record: Record, source: str) -> TrainExample:
    """Converts a record to a training pair.

    Raises:
        UserError: if it is not a valid pair; the message names file, row and field.
    """
    query = _side(record, "query")
    several = record.values.get("targets")
    if several is not None and (
        record.values.get("target") is not None or not isinstance(several, list) or not several
    ):
        raise UserError(
            f"{record.where}: field targets: expected a non-empty list and no field target in the same record"
        )
    if several is None:
        targets = [_side(record, "target")]
    else:
        targets = [_input(record, item, f"targets[{i}]") for i, item in enumerate(several)]
    found = record.values.get("negatives") or []
    if not isinstance(found, list):
        raise UserError(f"{record.where}: field negatives: expected a list, found {shown(found)}")
    negatives = tuple(_input(record, item, f"negatives[{i}]") for i, item in enumerate(found))
    scores = _scores(record, len(targets), len(negatives))
    pair = TrainExample(
        query, targets[0], negatives, source, origin=record.where, more_targets=tuple(targets[1:]), scores=scores
    )
    instruction = record.values.get("target_instruction")
    if instruction is not None and not isinstance(instruction, str):
        raise UserError(f"{record.where}: field target_instruction: expected a text, found {shown(instruction)}")
    return pair.with_target_instruction(instruction) if instruction else pair


def _scores(record: Record, num_targets: int, num_negatives: int) -> tuple[float, ...]:
    """Returns the scores of targets, then negatives; null or a missing list gives NaN, () if both are missing."""
    scores: list[float] = []
    names = ("target_scores", num_targets), ("negative_scores", num_negatives)
    if all(record.values.get(name) is None for name, _ in names):
        return ()
    for name, number in names:
        values = record.values.get(name)
        values = [None] * number if values is None else values
        good = isinstance(values, list) and len(values) == number
        if not good or not all(value is None or _is_number(value) for value in values):
            raise UserError(f"{record.where}: field {name}: expected a list of {number} numbers")
        scores += [math.nan if value is None else float(value) for value in values]
    return tuple(scores)


def read_eval_records(path: Path) -> list[EvalQuery]:
    """Reads evaluation queries from a `.jsonl`, `.parquet` or `.tar` file, or from all such files in a folder.

    Raises:
        UserError: if a record is not a valid query; the message names file, row and field.
    """
    shared: dict[EmbeddingInput, EmbeddingInput] = {}
    queries = []
    for record in _records(path):
        found = record.values.get("candidates")
        if not isinstance(found, list) or not found:
            raise UserError(f"{record.where}: field candidates: expected a non-empty list")
        candidates = [_input(record, item, f"candidates[{i}]") for i, item in enumerate(found)]
        relevant, gains = _relevant(record, len(candidates))
        unique = tuple(shared.setdefault(item, item) for item in candidates)
        queries.append(EvalQuery(_side(record, "query"), unique, relevant, gains))
    return queries


def _relevant(record: Record, num_candidates: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Positions of the relevant candidates, by default the first, and their gains if there are any."""
    found = record.values.get("relevant")
    places = [0] if found is None else found
    good = isinstance(places, list) and all(type(i) is int and 0 <= i < num_candidates for i in places)
    if not good or len(set(places)) < len(places) or not places:
        raise UserError(
            f"{record.where}: field relevant: expected a list of different positions, 0 to {num_candidates - 1}, "
            f"found {shown(found)}"
        )
    gains = record.values.get("gains") or []
    good = isinstance(gains, list) and len(gains) in (0, len(places)) and all(map(_is_number, gains))
    if not good or any(gain < 0 for gain in gains):
        raise UserError(
            f"{record.where}: field gains: expected {len(places)} numbers of 0 or more, one for each relevant position"
        )
    return tuple(places), tuple(map(float, gains))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def record_files(path: Path) -> list[Path]:
    """Returns the record files for a path: the file itself, the files in the folder, or the files with that stem.

    Args:
        path: A file, a folder, or a file without its ending: `data/Beach` also finds `data/Beach.jsonl`.
    """
    if path.is_dir():
        return sorted(file for ending in ENDINGS for file in path.glob(f"*{ending}"))
    named = [path, *(path.with_name(path.name + ending) for ending in ENDINGS)]
    return [file for file in named if file.is_file()]


def _records(path: Path) -> Iterator[Record]:
    files = record_files(path)
    if not files:
        raise UserError(f"{path}: not found; expected a .jsonl, .parquet or .tar file, or a folder of such files")
    for file in files:
        opened = open_records(file)
        for number in range(len(opened.sizes)):
            yield from opened.read(number)


class RecordFile(Protocol):
    """A file of records in blocks that can be read independently."""

    sizes: list[int]
    """Number of records in each block."""

    def read(self, number: int) -> list[Record]:
        """Reads the records of a block; images are not read."""
        ...


def open_records(file: Path) -> RecordFile:
    """Opens a file of records without reading its blocks.

    Raises:
        UserError: if the file has an unsupported format or is not readable.
    """
    kinds: dict[str, type[_Lines] | type[_Table] | type[_Shard]]
    kinds = {".jsonl": _Lines, ".parquet": _Table, ".tar": _Shard}
    if file.suffix not in kinds:
        raise UserError(f"{file}: expected a .jsonl, .parquet or .tar file")
    return kinds[file.suffix](file)


class _Lines:
    def __init__(self, file: Path) -> None:
        self._file, self._lines = file, JsonLines(file, BLOCK)
        self.sizes = self._lines.sizes

    def read(self, number: int) -> list[Record]:
        """Reads the records of a block."""
        return [_record(values, where, self._file) for where, values in self._lines.read(number)]


class _Shard:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._names = sorted(name for name in archives.members(file) if name.endswith(".json"))
        if not self._names:
            raise UserError(f"{file}: no KEY.json in this shard; expected one per record")
        self.sizes = [len(self._names[begin : begin + BLOCK]) for begin in range(0, len(self._names), BLOCK)]

    def read(self, number: int) -> list[Record]:
        """Reads the records of a block; a record consists of the files with the same key."""
        found = []
        for name in self._names[number * BLOCK : (number + 1) * BLOCK]:
            where = f"{self._file}, record {name}"
            values = json_object(decode(archives.read_member(self._file, name), where), where)
            found.append(_record(values, where, self._file, name.removesuffix(".json")))
        return found


def _record(values: dict[str, Any], where: str, file: Path, key: str = "") -> Record:
    if unknown := sorted(set(values) - FIELDS):
        near = did_you_mean(unknown[0], FIELDS)
        names = ", ".join(map(shown, unknown))
        raise UserError(f"{where}: unknown field {names}{near or ';'} expected {', '.join(sorted(FIELDS))}")
    return Record(values, where, file, key)


class _Table:
    """A parquet file whose blocks are its row groups."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._table = open_parquet(file)
        schema = self._table.schema_arrow
        unknown = sorted(set(schema.names) - set(FLAT) - FIELDS)
        if unknown:
            raise UserError(f"{file}: unknown columns {unknown}; expected some of {', '.join(FLAT)}")
        self._held = image_columns(schema)
        if binary := [name for name in self._held if name.endswith(("_text", "_instruction"))]:
            raise UserError(f"{file}: column {binary[0]}: expected texts, found bytes; write the column as text")
        self._columns = [name for name in schema.names if name not in self._held]
        self._looked_at = columns_to_read(self._table, self._held)
        self.sizes = [self._table.metadata.row_group(i).num_rows for i in range(self._table.num_row_groups)]

    def read(self, number: int) -> list[Record]:
        """Reads the rows of a group; image cells are referenced, not loaded."""
        with parquet_errors(self._file):
            table = self._table.read_row_group(number, columns=[*self._columns, *self._looked_at])
        begin = sum(self.sizes[:number])
        rows = plain_rows(table, self._columns)
        members = images_of_rows(table, self._held, begin)
        return [self._record(begin + i, row, members[i]) for i, row in enumerate(rows)]

    def _record(self, number: int, row: dict[str, Any] | str, members: dict[str, list[str]]) -> Record:
        where = f"{self._file}, row {number}"
        if isinstance(row, str):
            raise UserError(f"{where}: {row}")
        sides: dict[str, dict[str, Any]] = {}
        for name, value in row.items():
            side, _, part = name.partition("_")
            if name in FLAT and value is not None:
                sides.setdefault(side, {})[part] = value
        for name, found in members.items():
            images = [ImageRef(path=str(self._file), member=member, origin=where) for member in found]
            if images:
                sides.setdefault(name.partition("_")[0], {}).setdefault("images", []).extend(images)
        values = {name: value for name, value in row.items() if name in FIELDS}
        negative = sides.pop("negative", None)
        return Record({**values, **sides, **({"negatives": [negative]} if negative else {})}, where, self._file)


def _side(record: Record, name: str) -> EmbeddingInput:
    if record.values.get(name) is None:
        raise UserError(f"{record.where}: field {name} is missing")
    return _input(record, record.values[name], name)


def _input(record: Record, value: Any, field: str) -> EmbeddingInput:
    origin = f"{record.where}, field {field}"
    value = {"text": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or set(value) - SIDE_FIELDS:
        raise UserError(f"{origin}: expected a text or an object with {', '.join(sorted(SIDE_FIELDS))}")
    for name in ("text", "instruction"):
        if value.get(name) is not None and not isinstance(value[name], str):
            raise UserError(f"{origin}: {name}: expected a text, found {shown(value[name])}")
        require_unicode(value.get(name), origin)
    try:
        given = named_images({name: found for name, found in value.items() if found})
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    images = tuple(record.image(name, origin) for name in given)
    video = record.video(value["video"], origin) if value.get("video") else None
    if not images and not value.get("text") and video is None:
        raise UserError(f"{origin}: empty; expected a text, an image or a video")
    return EmbeddingInput(value.get("text") or None, images, value.get("instruction"), video)
