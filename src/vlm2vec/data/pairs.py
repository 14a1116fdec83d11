"""Reads training pairs from a table of any common layout.

The columns of query, target and negatives are found by name or given. Every row is checked before a model is loaded.
`write_pairs` writes the pairs in the layout of `vlm2vec.data.records`: a training set, and an evaluation set of the
held-out pairs.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm2vec.data.pair_columns import PairColumns, find_columns, names_images
from vlm2vec.data.pair_tables import Row, read_rows
from vlm2vec.errors import UserError, shown
from vlm2vec.files import replacing
from vlm2vec.media.images import ImageRef, named_images
from vlm2vec.media.text import require_unicode

MAX_HELD_OUT = 1000
MAX_PROBLEMS = 3
GRADES = ("label", "labels", "score", "scores", "similarity", "similarity_score", "is_duplicate")
"""Columns with which other libraries mark pairs that are no match."""
SET_NAME, HELD_OUT = "pairs", "HeldOut"
BENCHMARK_FILE = "benchmark.yaml"
SIDE_KEYS = ("text", "image", "images", "instruction")


@dataclass(frozen=True)
class Pairs:
    """A table of pairs.

    Attributes:
        source: The file or folder.
        columns: The roles of its columns.
        records: For each pair, `query`, `target` and (if any) `negatives`; each side is a dictionary with some of
            `text`, `instruction` and `images` (a list of `ImageRef`).
    """

    source: Path
    columns: PairColumns
    records: list[Row]


def read_pairs(
    source: Path, query: Sequence[str] = (), target: Sequence[str] = (), negatives: Sequence[str] = ()
) -> Pairs:
    """Reads and checks every row; image files must exist, but are not decoded.

    Args:
        source: A `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, or a folder of images with captions: a
            `metadata.csv` or `metadata.jsonl` with `file_name` and `text`, or a `.txt` file next to each image. If a
            cell contains a list of texts, such as five captions of an image, each text makes a pair.
        query: Columns of the query; empty: find them by name (`LAYOUTS`).
        target: Columns of the target; empty: find them by name.
        negatives: Columns of the negatives; empty: find them by name.

    Raises:
        UserError: if the source is missing or empty, no layout matches its columns, or rows lack a side or an image;
            the message names the first such rows and the number of further ones.
    """
    rows = list(read_rows(source))
    if not rows:
        raise UserError(f"{source}: contains no rows; expected at least two pairs")
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    columns = find_columns(str(source), names, query, target, negatives)
    folder = (source if source.is_dir() else source.parent).absolute()
    images = {name for name in names if names_images(name, [row.get(name) for _, row in rows])}
    records: list[Row] = []
    problems: list[str] = []
    for place, row in rows:
        try:
            records += _Reader(columns, images, folder, f"{source}, {place}").records(row)
        except UserError as error:
            problems.append(str(error))
    if problems:
        more = f"; and {len(problems) - MAX_PROBLEMS} more rows" if len(problems) > MAX_PROBLEMS else ""
        raise UserError(f"{'; '.join(problems[:MAX_PROBLEMS])}{more}. Fix or remove them")
    return Pairs(source, columns, records)


def hold_out(pairs: Pairs, share: float = 0.1, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Splits the pairs into training pairs and held-out pairs.

    Pairs that share an image (or a query, if there are no images) stay together, so that no held-out image is in the
    training pairs.

    Args:
        pairs: All pairs.
        share: Fraction of the pairs to hold out, up to `MAX_HELD_OUT` pairs.
        seed: Seed of the random choice.

    Returns:
        Training pairs and held-out pairs, both in the order of the source.
    """
    groups: dict[Any, list[int]] = {}
    for number, record in enumerate(pairs.records):
        groups.setdefault(_group(record), []).append(number)
    wanted = min(MAX_HELD_OUT, round(share * len(pairs.records)))
    held: set[int] = set()
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    for numbers in order:
        if len(held) + len(numbers) <= wanted:
            held.update(numbers)
    train = [record for number, record in enumerate(pairs.records) if number not in held]
    return train, [pairs.records[number] for number in sorted(held)]


def write_pairs(folder: Path, train: Sequence[Row], held: Sequence[Row]) -> None:
    """Writes `train/pairs.jsonl` and, if pairs are held out, `eval/HeldOut.jsonl` and `benchmark.yaml`.

    The evaluation ranks all held-out targets for every held-out query. Image files are referenced by absolute path;
    images inside other files (parquet cells) are written to `images/`. An existing folder is replaced as a whole.
    """
    with replacing(folder) as beside:

        def written(side: Row) -> Row:
            names = [_file_of(image, beside, folder) for image in side.get("images", ())]
            return {**side, **({"images": names} if names else {})}

        _write_lines(
            beside / "train" / f"{SET_NAME}.jsonl",
            (
                {
                    key: [written(item) for item in value] if isinstance(value, list) else written(value)
                    for key, value in record.items()
                }
                for record in train
            ),
        )
        if held:
            lines = (
                {"query": written(query), "candidates": [written(item) for item in found], "relevant": relevant}
                for query, found, relevant in _merged(held)
            )
            _write_lines(beside / "eval" / f"{HELD_OUT}.jsonl", lines)
            task = {"reader": "records", "scope": "global"}
            content = {"name": folder.name, "source": {"eval": "eval"}, "tasks": {HELD_OUT: task}}
            (beside / BENCHMARK_FILE).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def describe(pairs: Pairs, num_examples: int = 3) -> list[str]:
    """Returns lines that show the roles of the columns and the first pairs."""
    columns = pairs.columns
    roles = [f"query: {' and '.join(columns.query)}", f"target: {' and '.join(columns.target)}"]
    roles += [f"negatives: {', '.join(columns.negatives)}"] if columns.negatives else []
    roles += [f"unused: {', '.join(columns.unused)}"] if columns.unused else []
    graded = [name for name in columns.unused if name.lower() in GRADES]
    roles += [f"every row is trained as a match, whatever {graded[0]} says"] if graded else []
    first = pairs.records[:num_examples]
    return [
        f"{pairs.source}: {len(pairs.records)} pairs; {'; '.join(roles)}",
        *(f"  {_words(record['query'])} -> {_words(record['target'])}" for record in first),
    ]


@dataclass(frozen=True)
class _Reader:
    """Converts a row to pairs."""

    columns: PairColumns
    images: set[str]
    """Columns that contain image paths."""
    folder: Path
    where: str

    def records(self, row: Row) -> list[Row]:
        sides = {}
        for role, names in (("query", self.columns.query), ("target", self.columns.target)):
            sides[role] = self._sides(row, names)
            if not sides[role]:
                raise UserError(f"{self.where}: {role} is empty (column {' and '.join(names)})")
        negatives = [side for name in self.columns.negatives for side in self._sides(row, (name,))]
        further = {"negatives": negatives} if negatives else {}
        return [{"query": query, "target": target, **further} for query in sides["query"] for target in sides["target"]]

    def _sides(self, row: Row, names: Sequence[str]) -> list[Row]:
        """Returns the side in these columns, or a side per item if the cell is a list. Empty sides are left out."""
        first = row.get(names[0])
        cells = [row]
        if len(names) == 1 and isinstance(first, list) and not _are_images(first):
            cells = [{names[0]: item} for item in first]
        found = [self._side([(name, each.get(name)) for name in names]) for each in cells]
        return [side for side in found if side.get("text") or side.get("images")]

    def _side(self, values: Iterable[tuple[str, Any]]) -> Row:
        texts: list[str] = []
        side: Row = {}
        for name, value in values:
            if isinstance(value, dict):
                if unknown := sorted(set(value) - set(SIDE_KEYS)):
                    raise UserError(f"{self.where}, {name}: unknown keys {unknown}; expected {', '.join(SIDE_KEYS)}")
                texts += [value["text"]] if value.get("text") else []
                side |= {"instruction": value["instruction"]} if value.get("instruction") else {}
                side.setdefault("images", []).extend(self._image(item, name) for item in self._given(value, name))
            elif isinstance(value, list) and _are_images(value):
                side.setdefault("images", []).extend(value)
            elif isinstance(value, ImageRef) or (name in self.images and value):
                side.setdefault("images", []).append(self._image(value, name))
            elif isinstance(value, str):
                texts += [value] if value.strip() else []
            elif value is not None and value == value:  # empty parquet cells can be NaN
                raise UserError(f"{self.where}, {name}: expected a text or an image path, found {shown(value)}")
        for text in (*texts, *filter(None, [side.get("instruction")])):
            if not isinstance(text, str):
                raise UserError(f"{self.where}: expected a text, found {shown(text)}")
            require_unicode(text, self.where)
        if len(texts) > 1:
            raise UserError(f"{self.where}: two texts on one side; give one text column and one image column")
        return {"text": texts[0], **side} if texts else side

    def _given(self, value: Row, name: str) -> list[Any]:
        try:
            return named_images({key: found for key, found in value.items() if found})
        except UserError as error:
            raise UserError(f"{self.where}, {name}: {error}") from error

    def _image(self, value: Any, name: str) -> ImageRef:
        where = f"{self.where}, {name}"
        if isinstance(value, ImageRef):
            return value
        if not isinstance(value, str):
            raise UserError(f"{where}: expected an image path, found {shown(value)}")
        try:
            image = ImageRef.of(value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if image.path is None:
            return image
        path = self.folder / image.path
        if not path.is_file():
            raise UserError(f"{where}: {value}: image not found; paths are relative to {self.folder}")
        return ImageRef(path=str(path), origin=where)


def _are_images(cell: list[Any]) -> bool:
    """Whether a list is the images of one cell, which belong to one side. A list of texts is a side for each."""
    return all(isinstance(item, ImageRef) for item in cell)


def _key(side: Row) -> Any:
    images = tuple((image.path, image.member, image.data) for image in side.get("images", ()))
    return side.get("text"), side.get("instruction"), images


def _group(record: Row) -> Any:
    images = [*record["query"].get("images", ()), *record["target"].get("images", ())]
    return (images[0].path, images[0].member, images[0].data) if images else _key(record["query"])


def _merged(held: Sequence[Row]) -> Iterable[tuple[Row, list[Row], list[int]]]:
    """Yields each distinct query with its candidates (all its targets, then negatives) and the target positions."""
    by_query: dict[Any, list[Row]] = {}
    for record in held:
        by_query.setdefault(_key(record["query"]), []).append(record)
    for records in by_query.values():
        targets = list({_key(record["target"]): record["target"] for record in records}.values())
        negatives = [item for record in records for item in record.get("negatives", ())]
        yield records[0]["query"], [*targets, *negatives], list(range(len(targets)))


def _file_of(image: ImageRef, beside: Path, folder: Path) -> str:
    """Returns the path of an image's file; an image inside another file is first written to the folder's `images/`."""
    if image.path is not None and image.member is None:
        return image.path
    content = image.read()
    name = hashlib.sha256(content).hexdigest()[:24]
    (beside / "images").mkdir(exist_ok=True, parents=True)
    (beside / "images" / name).write_bytes(content)
    return str(folder.absolute() / "images" / name)


def _write_lines(path: Path, values: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")


def _words(side: Row) -> str:
    """Returns a short description of a side."""
    parts = [
        Path(image.path or "image").name + (f":{image.member}" if image.member else "")
        for image in side.get("images", ())
    ]
    return " + ".join([*([shown(side["text"])] if side.get("text") else []), *parts])
