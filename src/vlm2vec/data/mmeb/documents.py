"""Reads visual document sets in the BEIR layout (ViDoRe, VisRAG, ViDoSeek, MMLongBench): queries, qrels, corpus.

`<root>/<name>/{queries,qrels,corpus}*` are parquet files, either in the hub's layout (`queries/test-*.parquet`) or as a
single `queries.parquet`. Scope is global: every query ranks the whole corpus, with graded relevance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from vlm2vec.data.mmeb.images import PUBLISHED, read_parquet
from vlm2vec.data.mmeb.instruct import candidate_of, query_of
from vlm2vec.data.mmeb.media import Media
from vlm2vec.data.mmeb.quirks import Quirks
from vlm2vec.errors import UserError
from vlm2vec.media.cells import parquet_errors
from vlm2vec.media.images import ImageRef
from vlm2vec.types import EmbeddingInput, EvalQuery

PARTS = ("queries", "qrels", "corpus")
QUERY_PROMPT = "Find a document image that matches the given query:"
TARGET_PROMPT = "Understand the content of the provided document image."
PLACEHOLDER = "<|image_1|>"


def read_visdoc_set(root: Path, name: str, language: str | None = None, quirks: Quirks = PUBLISHED) -> list[EvalQuery]:
    """Reads the queries of a set; they share one candidate tuple, the corpus.

    Args:
        root: The data folder.
        name: Folder of the set.
        language: Keep only queries in this language; None: keep all.
        quirks: Controls how rows are converted to inputs.

    Raises:
        UserError: for a missing part or column, a judgement that names an unknown document, or a query without a
            relevant document (the published files have none).
    """
    folder = root / name
    media = Media(root, ("visdoc-tasks", f"visdoc-tasks/{name}"))
    place: dict[str, int] = {}
    corpus: list[EmbeddingInput] = []
    for where, row in _rows(folder, "corpus", ("corpus-id",)):
        place[str(row["corpus-id"])] = len(corpus)
        image = _image(row, media, f"{where}, document {row['corpus-id']}", quirks)
        corpus.append(candidate_of(quirks, TARGET_PROMPT, PLACEHOLDER, images=(image,)))
    candidates = tuple(corpus)
    grades: dict[str, dict[int, float]] = {}
    for where, row in _rows(folder, "qrels", ("query-id", "corpus-id", "score")):
        document = str(row["corpus-id"])
        if document not in place:
            raise UserError(f"{where}: corpus-id {document} is not in the corpus of {name}")
        if row["score"] > 0:
            mine = grades.setdefault(str(row["query-id"]), {})
            # A document that is judged twice gets the higher grade.
            mine[place[document]] = max(float(row["score"]), mine.get(place[document], 0.0))
    queries = []
    for where, row in _rows(folder, "queries", ("query-id", "query")):
        if language is not None and row.get("language") != language:
            continue
        judged = grades.get(str(row["query-id"]))
        if not judged:
            raise UserError(f"{where}: query {row['query-id']} has no relevant document in qrels")
        query = query_of(quirks, QUERY_PROMPT, row["query"])
        queries.append(EvalQuery(query, candidates, tuple(judged), tuple(judged.values())))
    if not queries:
        raise UserError(f"{folder}: no queries" + (f" in language {language}" if language else ""))
    return queries


def part_files(folder: Path, part: str) -> list[Path]:
    """Returns the parquet files of a part (queries, qrels or corpus)."""
    return sorted([*folder.glob(f"{part}/*.parquet"), *folder.glob(f"{part}*.parquet")])


def _rows(folder: Path, part: str, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    files = part_files(folder, part)
    if not files:
        raise UserError(f"{folder}: no {part}/*.parquet found; `vlm2vec data check` prints how to download it")
    for file in files:
        with parquet_errors(file):
            names = pq.read_schema(file).names
        for column in columns:
            if column not in names:
                raise UserError(f"{file}: column {column} is missing; expected {', '.join(columns)}")
        # Images in the file are not loaded here; a row is read again when its image is decoded.
        small = [name for name in names if name != "image"]
        for i, row in enumerate(read_parquet(file, small).to_pylist()):
            yield f"{file}, row {i}", {**row, "image_at": (file, i) if "image" in names else None}


def _image(row: dict[str, Any], media: Media, origin: str, quirks: Quirks) -> ImageRef:
    """Returns the page image: `<corpus-id>.png` next to the parquet files if it exists, otherwise the parquet cell."""
    rules = quirks.rules("page", str(row["corpus-id"]))
    if row["image_at"] is None:
        return replace(media.image(f"{row['corpus-id']}.png", origin), rules=rules)
    file, number = row["image_at"]
    return ImageRef(path=str(file), member=f"image[{number}]", origin=origin, rules=rules)
