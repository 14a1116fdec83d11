"""Rows of the published layouts -> `TrainExample` / `EvalQuery`. Upstream's column names appear only here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec.errors import UserError
from vlm2vec.images import ImageRef
from vlm2vec.types import EmbeddingInput, EvalQuery, TrainExample

TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
EVAL_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
TRAIN_FILES = "original-*.parquet"
EVAL_FILES = "test-*.parquet"
DANGLING = "<|image_1|>"


def list_sets(root: Path, files: str = TRAIN_FILES) -> list[str]:
    """Names of the sets in a folder, sorted.

    Raises:
        UserError: if the folder is missing or holds none.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such data folder")
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and any(path.glob(files)))
    if not names:
        raise UserError(f"{root}: no sets there; expected folders with {files}")
    return names


def read_train_set(root: Path, name: str, use_negatives: bool = True) -> list[TrainExample]:
    """Pairs of one set in the MMEB-train layout: `<root>/<name>/original-*.parquet`.

    Pictures are looked for at `<root>/<path>`, then in `<root>/images_zip/<Set>.zip`; they are not opened.

    Args:
        root: The data folder.
        name: Folder of the set.
        use_negatives: Whether `neg_*` columns become explicit negatives.

    Raises:
        UserError: for a missing or empty set, a missing or unknown column, or a row without query or target.
    """
    examples = []
    for where, row in _rows(root, name, TRAIN_FILES, TRAIN_COLUMNS):
        query = _input(row["qry"], row["qry_image_path"], root, f"{where}, field qry_image_path")
        target = _input(row["pos_text"], row["pos_image_path"], root, f"{where}, field pos_image_path")
        negative = _input(row["neg_text"], row["neg_image_path"], root, f"{where}, field neg_image_path")
        if query is None or target is None:
            side = "qry" if query is None else "pos_text"
            raise UserError(f"{where}: field {side} and its picture are both empty; remove the row or fill one")
        negatives = (negative,) if negative is not None and use_negatives else ()
        examples.append(TrainExample(query, target, negatives, name, origin=where))
    return examples


def read_eval_set(root: Path, name: str) -> list[EvalQuery]:
    """Queries of one set in the MMEB-eval layout: `<root>/<name>/test-*.parquet`; the first candidate is the gold.

    Pictures are looked for at `<root>/<path>`, then in `<root>/images.zip`; they are not opened.

    Raises:
        UserError: for a missing or empty set, a missing or unknown column, or candidates that do not line up.
    """
    shared: dict[EmbeddingInput, EmbeddingInput] = {}  # candidates repeat across queries: one object each
    queries = []
    for where, row in _rows(root, name, EVAL_FILES, EVAL_COLUMNS):
        query = _input(row["qry_text"], row["qry_img_path"], root, f"{where}, field qry_img_path")
        texts, paths = row["tgt_text"], row["tgt_img_path"]
        if query is None or not texts or len(texts) != len(paths):
            raise UserError(f"{where}: expected a query and as many tgt_text as tgt_img_path, at least one")
        candidates = []
        for i, (text, path) in enumerate(zip(texts, paths, strict=True)):
            candidate = _input(text, path, root, f"{where}, field tgt_img_path[{i}]")
            if candidate is None:
                raise UserError(f"{where}: candidate {i} has neither text nor picture")
            candidates.append(shared.setdefault(candidate, candidate))
        queries.append(EvalQuery(query, tuple(candidates)))
    return queries


def _rows(root: Path, name: str, pattern: str, columns: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    files = sorted((root / name).glob(pattern))
    if not files:
        raise UserError(f"{root / name}: no {pattern} there; known sets: {', '.join(list_sets(root, pattern))}")
    rows = []
    for file in files:
        try:
            table = pq.read_table(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{file}: not a readable parquet file ({error}); download it again") from error
        for column in sorted(set(columns) ^ set(table.schema.names)):
            problem = "unknown" if column in table.schema.names else "missing"
            raise UserError(f"{file}: column {column} is {problem}; expected {', '.join(columns)}")
        rows += [(f"{file}, row {i}", row) for i, row in enumerate(table.to_pylist())]
    if not rows:
        raise UserError(f"{root / name}: the set is empty; expected at least one row")
    return rows


def _input(text: str | None, path: str | None, root: Path, origin: str) -> EmbeddingInput | None:
    """None where both fields are empty (upstream writes "" for absent)."""
    if not path:
        # Some published rows (WebQA, EDIS) name a picture that they do not have.
        text = (text or "").replace(f"{DANGLING}\n", "").replace(DANGLING, "")
        return EmbeddingInput(text=text) if text else None
    return EmbeddingInput(text=text or None, images=(_locate(path, root, origin),))


def _locate(path: str, root: Path, origin: str) -> ImageRef:
    """The file if it is unpacked, else a zip member: `images/Set/x.jpg` in `images_zip/Set.zip`, or `images.zip`."""
    head, _, member = path.partition("/")
    train_zip = root / "images_zip" / f"{member.split('/')[0]}.zip"
    if head == "images" and train_zip.is_file():
        return ImageRef(path=str(train_zip), member=member, origin=origin)
    if (root / "images.zip").is_file():
        return ImageRef(path=str(root / "images.zip"), member=path, origin=origin)
    return ImageRef(path=str(root / path), origin=origin)
