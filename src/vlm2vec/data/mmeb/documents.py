"""Visual documents in the BEIR layout of ViDoRe, VisRAG, ViDoSeek and MMLongBench: queries, judgements, a corpus.

`<root>/<name>/{queries,qrels,corpus}*` hold parquet files, as the hub lays them out (`queries/test-*.parquet`) or as a
single `queries.parquet`. Scope is global: every query is ranked against the whole corpus, with graded relevance.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from vlm2vec.data.mmeb.images import read_parquet
from vlm2vec.data.mmeb.media import Media
from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.types import EmbeddingInput, EvalQuery

PARTS = ("queries", "qrels", "corpus")
QUERY_PROMPT = "Find a document image that matches the given query:"
TARGET_PROMPT = "Understand the content of the provided document image."
PLACEHOLDER = "<|image_1|>"


def read_visdoc_set(root: Path, name: str, language: str | None = None) -> list[EvalQuery]:
    """Queries of one set; they share one candidate tuple, the corpus.

    Args:
        root: The data folder.
        name: Folder of the set.
        language: Only queries of this language, where the set has several.

    Raises:
        UserError: for a missing part or column, or a judgement that names an unknown document. Queries without any
            relevant document are an error, too: upstream's files have none.
    """
    folder = root / name
    media = Media(root, ("visdoc-tasks", f"visdoc-tasks/{name}"))
    place: dict[str, int] = {}
    corpus: list[EmbeddingInput] = []
    for where, row in _rows(folder, "corpus", ("corpus-id",)):
        place[str(row["corpus-id"])] = len(corpus)
        image = _image(row, media, f"{where}, document {row['corpus-id']}")
        corpus.append(EmbeddingInput(f"{PLACEHOLDER} {TARGET_PROMPT}", (image,)))
    candidates = tuple(corpus)
    grades: dict[str, dict[int, float]] = {}
    for where, row in _rows(folder, "qrels", ("query-id", "corpus-id", "score")):
        document = str(row["corpus-id"])
        if document not in place:
            raise UserError(f"{where}: corpus-id {document} is not in the corpus of {name}")
        if row["score"] > 0:
            grades.setdefault(str(row["query-id"]), {})[place[document]] = float(row["score"])
    queries = []
    for where, row in _rows(folder, "queries", ("query-id", "query")):
        if language is not None and row.get("language") != language:
            continue
        mine = grades.get(str(row["query-id"]))
        if not mine:
            raise UserError(f"{where}: query {row['query-id']} has no relevant document in qrels")
        query = EmbeddingInput(f"{QUERY_PROMPT} {row['query']}")
        queries.append(EvalQuery(query, candidates, tuple(mine), tuple(mine.values())))
    if not queries:
        raise UserError(f"{folder}: no queries" + (f" in language {language}" if language else ""))
    return queries


def part_files(folder: Path, part: str) -> list[Path]:
    """The parquet files of a part."""
    return sorted([*folder.glob(f"{part}/*.parquet"), *folder.glob(f"{part}*.parquet")])


def _rows(folder: Path, part: str, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    files = part_files(folder, part)
    if not files:
        raise UserError(f"{folder}: no {part}/*.parquet there; `vlm2vec data check` says how to get it")
    for file in files:
        names = pq.read_schema(file).names
        for column in columns:
            if column not in names:
                raise UserError(f"{file}: column {column} is missing; expected {', '.join(columns)}")
        # Images inside the file are not loaded: their rows are read again when one is decoded.
        small = [name for name in names if name != "image"]
        for i, row in enumerate(read_parquet(file, small).to_pylist()):
            yield f"{file}, row {i}", {**row, "image_at": (file, i) if "image" in names else None}


def _image(row: dict[str, Any], media: Media, origin: str) -> ImageRef:
    """The page: beside the parquet files as `<corpus-id>.png`, else inside them."""
    if row["image_at"] is None:
        return media.image(f"{row['corpus-id']}.png", origin)
    file, number = row["image_at"]
    return ImageRef(path=str(file), member=f"image[{number}]", origin=origin)
