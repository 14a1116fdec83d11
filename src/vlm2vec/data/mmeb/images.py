"""Reads evaluation rows of the published MMEB layouts, and writes training sets; their column names are here only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec.data.mmeb.instruct import Kind, kind_of, prompts_of
from vlm2vec.data.mmeb.media import Media
from vlm2vec.data.mmeb.quirks import Quirks
from vlm2vec.errors import UserError
from vlm2vec.files import replacing
from vlm2vec.media.cells import parquet_errors
from vlm2vec.media.pixels import PixelRules
from vlm2vec.types import BARE_IMAGE_TOKEN, EmbeddingInput, EvalQuery

TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
SCORED_COLUMNS = (*TRAIN_COLUMNS, "pos_score", "neg_score")
"""What `vlm2vec mine --judge` writes: the judge's scores beside the published columns."""
EVAL_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
INSTRUCT_COLUMNS = ("qry_inst", "tgt_inst", *EVAL_COLUMNS)
TRAIN_FILES = "original-*.parquet"
WORDINGS = {"original": TRAIN_FILES, "diverse": "diverse_instruction-*.parquet"}
EVAL_FILES = "test-*.parquet"
PLACEHOLDER = "<|image_1|>"
BLOCK = 65536  # rows of mined pairs that are written at once
PUBLISHED = Quirks()


def list_sets(root: Path, files: str = TRAIN_FILES) -> list[str]:
    """Returns the sorted names of the sets in a folder.

    Raises:
        UserError: if the folder is missing or contains no sets.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such data folder")
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and any(path.glob(files)))
    if not names:
        raise UserError(f"{root}: contains no sets; expected folders with {files}")
    return names


def read_eval_set(root: Path, name: str, kind: Kind | None = None, quirks: Quirks = PUBLISHED) -> list[EvalQuery]:
    """Reads the queries of a set in either MMEB-eval layout, `<root>/<name>/test-*.parquet`; candidate 0 is correct.

    Args:
        root: The data folder.
        name: Folder of the set.
        kind: The reference loader for the set, used in the layout with separate instructions; None: inferred per row.
        quirks: Controls how rows are converted to inputs.

    Raises:
        UserError: for a missing or empty set, a missing or unknown column, or candidates that do not line up.
    """
    media = Media(root, ("image-tasks", "image-tasks/MMEB"))
    rows = _Candidates(media, quirks)
    queries = []
    for where, row in _rows(root, name, EVAL_FILES, EVAL_COLUMNS, INSTRUCT_COLUMNS):
        texts, paths = row["tgt_text"], row["tgt_img_path"]
        if not texts or len(texts) != len(paths):
            raise UserError(f"{where}: expected a query and as many tgt_text as tgt_img_path, at least one")
        parts = _side_texts(row, kind, name, quirks)
        text = parts.query if row["qry_img_path"] else without_image(parts.query, quirks)
        query = input_of(text, row["qry_img_path"], media, f"{where}, field qry_img_path", parts.asks, rows.rules)
        if query is None:
            raise UserError(f"{where}: expected a query and as many tgt_text as tgt_img_path, at least one")
        queries.append(EvalQuery(query, rows.of(parts, paths, where)))
    return queries


class _Candidates:
    """Candidates of a set; equal candidates of several queries share one object."""

    def __init__(self, media: Media, quirks: Quirks) -> None:
        self.rules = quirks.rules("image")
        self._media = media
        self._quirks = quirks
        self._shared: dict[EmbeddingInput, EmbeddingInput] = {}
        self._made: dict[tuple[str | None, str | None, str | None], EmbeddingInput] = {}
        self._first_of: dict[str, EmbeddingInput] = {}

    def of(self, parts: _Texts, paths: list[str], where: str) -> tuple[EmbeddingInput, ...]:
        """Returns the candidates of a row in their original order."""
        found = []
        for i, (text, path) in enumerate(zip(parts.targets, paths, strict=True)):
            fields = (text, path, parts.wants)
            candidate = self._made.get(fields)
            if candidate is None:
                origin = f"{where}, field tgt_img_path[{i}]"
                text = text if path else without_image(text, self._quirks)
                # The reference evaluation also counts an empty text as a candidate.
                candidate = input_of(text, path, self._media, origin, parts.wants, self.rules) or EmbeddingInput(
                    text=""
                )
                self._made[fields] = candidate = self._shared.setdefault(candidate, candidate)
            if parts.identities:
                candidate = self._first_of.setdefault(parts.identities[i], candidate)
            found.append(candidate)
        return tuple(found)


@dataclass(frozen=True)
class _Texts:
    """The texts of a row, their separate instructions, and the identities of the candidates (empty: use content)."""

    query: str
    targets: list[str]
    identities: list[str]
    asks: str | None = None
    wants: str | None = None


def _side_texts(row: dict[str, Any], kind: Kind | None, name: str, quirks: Quirks) -> _Texts:
    texts = row["tgt_text"]
    if "qry_inst" not in row:  # the first layout: candidates are identified by text and path
        return _Texts(row["qry_text"], texts, [])
    kind = kind or kind_of(row)
    prompts = prompts_of(kind, row, name)
    identities = prompts.identities if quirks.identity == "published" else []
    asks, wants = (((row[side] or "").replace(PLACEHOLDER, "").strip() or None) for side in ("qry_inst", "tgt_inst"))
    found = _Texts((row["qry_text"] or "").strip(), [text.strip() for text in texts], identities, asks, wants)
    if quirks.whitespace == "published":
        found = _Texts(prompts.query, prompts.targets, identities)
    if quirks.candidate_instruction == "none":
        return replace(found, targets=[text.strip() for text in texts], wants=None)
    return found


def write_negatives(
    root: Path,
    sizes: Mapping[str, int],
    negatives: Sequence[Sequence[int]],
    output: Path,
    scores: Sequence[Sequence[float]] | None = None,
) -> None:
    """Writes sets again with mined negatives: lists in the `neg_*` columns, one entry a negative.

    Args:
        root: The data folder that the sets were read from.
        sizes: Number of pairs of each set, by its folder's name.
        negatives: For each pair, in reading order over all the sets, the pairs whose positives are its negatives.
        output: Another data folder; the images of `root` are linked into it.
        scores: For each pair, scores of its target and then of its negatives, written as further columns. None: none.
    """
    pairs = pa.concat_tables([_pairs(file) for name in sizes for file in set_files(root, name, TRAIN_FILES)])
    begin = 0
    for name, size in sizes.items():
        with replacing(output / name / TRAIN_FILES.replace("*", "00000-of-00001")) as beside:
            _write_mined(beside, pairs, range(begin, begin + size), negatives, scores)
        begin += size
    for images in ("images", "images_zip", "images.zip"):
        link = output / images
        if (root / images).exists() and not link.exists():
            link.symlink_to((root / images).resolve())


def _pairs(file: Path) -> pa.Table:
    """The pairs of a file without their negatives, as texts."""
    table = read_parquet(file)
    check_columns(file, table.schema.names, TRAIN_COLUMNS, SCORED_COLUMNS)
    return table.select(TRAIN_COLUMNS[:4]).cast(pa.schema([(name, pa.string()) for name in TRAIN_COLUMNS[:4]]))


def _write_mined(
    file: Path,
    pairs: pa.Table,
    rows: range,
    negatives: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]] | None,
) -> None:
    """Writes these rows of all pairs with their negatives, in blocks, so that no row becomes a Python object."""
    writer = None
    for start in range(rows.start, rows.stop, BLOCK):
        stop = min(start + BLOCK, rows.stop)
        chosen = negatives[start:stop]
        ends = pa.array(np.cumsum([0, *map(len, chosen)]), pa.int32())
        places = pa.array(list(chain.from_iterable(chosen)), pa.int64())
        table = pairs.slice(start, stop - start)
        for name, column in zip(TRAIN_COLUMNS[4:], ("pos_text", "pos_image_path"), strict=True):
            taken = pairs[column].take(places).combine_chunks()
            table = table.append_column(name, pa.ListArray.from_arrays(ends, taken))
        if scores is not None:
            judged = [(first, rest) for first, *rest in scores[start:stop]]
            table = table.append_column("pos_score", pa.array([first for first, _ in judged], pa.float64()))
            table = table.append_column("neg_score", pa.array([rest for _, rest in judged], pa.list_(pa.float64())))
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def write_train_set(root: Path, name: str, rows: Sequence[dict[str, str]]) -> None:
    """Writes rows in the MMEB-train layout; missing columns are left empty."""
    _write_set(root, name, pa.Table.from_pylist([{**dict.fromkeys(TRAIN_COLUMNS, ""), **row} for row in rows]))


def _write_set(root: Path, name: str, table: pa.Table) -> None:
    with replacing(root / name / TRAIN_FILES.replace("*", "00000-of-00001")) as beside:
        pq.write_table(table, beside)


def _rows(root: Path, name: str, pattern: str, *layouts: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the rows of a set with their locations, after checking the columns against the known layouts."""
    rows = []
    for file in set_files(root, name, pattern):
        table = read_parquet(file)
        check_columns(file, table.schema.names, *layouts)
        rows += [(f"{file}, row {i}", row) for i, row in enumerate(table.to_pylist())]
    if not rows:
        raise UserError(f"{root / name}: the set is empty; expected at least one row")
    return rows


def set_files(root: Path, name: str, pattern: str) -> list[Path]:
    """Returns the files of a set.

    Raises:
        UserError: if there are none.
    """
    files = sorted((root / name).glob(pattern))
    if not files:
        present = sorted(path.name for path in root.iterdir() if any(path.glob(pattern))) if root.is_dir() else []
        known = f"known sets: {', '.join(present)}" if present else "this folder has no set"
        fetch = "; vlm2vec data fetch downloads those of MMEB" if pattern == EVAL_FILES else ""
        raise UserError(f"{root / name}: no {pattern} found; {known}{fetch}")
    return files


def check_columns(file: Path, names: Sequence[str], *layouts: Sequence[str]) -> None:
    """Checks that the columns of a file are those of one of the layouts.

    Raises:
        UserError: naming a column that is unknown or missing.
    """
    columns = min(layouts, key=lambda layout: len(set(layout) ^ set(names)))
    for column in sorted(set(columns) ^ set(names)):
        problem = "unknown" if column in names else "missing"
        raise UserError(f"{file}: column {column} is {problem}; expected {', '.join(columns)}")


def read_parquet(file: Path, columns: Sequence[str] | None = None) -> Any:
    """Reads a parquet file as an Arrow table.

    Raises:
        UserError: if the file is not readable.
    """
    with parquet_errors(file):
        return pq.read_table(file, columns=columns)


def input_of(
    text: str | None,
    path: str | None,
    media: Media,
    origin: str,
    instruction: str | None = None,
    rules: PixelRules | None = None,
) -> EmbeddingInput | None:
    """Builds an input; returns None if both fields are empty (the published files write "" for a missing value)."""
    if not path:
        return EmbeddingInput(text=text, instruction=instruction) if text else None
    image = media.image(path, origin)
    image = image if rules is None else replace(image, rules=rules)
    return EmbeddingInput(text=text or None, images=(image,), instruction=instruction)


def without_image(text: str | None, quirks: Quirks = PUBLISHED) -> str:
    """Returns the text of a side without an image: some rows (WebQA, EDIS) have a placeholder but no image path."""
    text = text or ""
    if quirks.missing_image == "published":
        return text.replace(PLACEHOLDER, BARE_IMAGE_TOKEN)
    return text.replace(f"{PLACEHOLDER}\n", "").replace(f"{PLACEHOLDER} ", "").replace(PLACEHOLDER, "")
