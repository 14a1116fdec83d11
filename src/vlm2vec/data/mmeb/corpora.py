"""Reads sets with queries, corpus and judgements in three files: MMEB-V3's text, tool and multi-condition sets.

The task table names the files (`files: {queries, corpus, qrels}`; JSON lines or parquet) relative to the data folder.
Without `qrels`, the query row names its relevant documents. Scope is global. The differences between families of sets
are listed in `FAMILIES`, whose keys are the first part of the task name. Source: the loaders `complex_text_retrieve`,
`toolde` and `mcmr` and the settings of the reference repository, June to September 2026.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm2vec.data.json_lines import read_json_lines
from vlm2vec.data.mmeb.images import read_parquet
from vlm2vec.data.mmeb.media import Media
from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.types import EmbeddingInput, EvalQuery

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Part = Literal["queries", "corpus", "qrels"]
# Candidate columns for the id and the text; the first column that a row has is used.
QUERY_IDS = ("_id", "id", "qid", "query_id", "query-id")
DOCUMENT_IDS = ("_id", "id", "doc_id", "document_id", "corpus-id", "candidate_id")
JUDGED_QUERY = ("query_id", "query-id", "qid", "q_id", "id")
JUDGED_DOCUMENT = ("corpus_id", "corpus-id", "doc_id", "document_id", "p_id")
QUERY_TEXTS = ("text", "query", "query_content", "short_query")
OWN_DOCUMENTS = ("gold_ids", "gold_ids_long", "label", "labels", "pos_ids")
PRODUCT_FIELDS = ("title", "description", "features", "price", "Date First Available")
PRODUCT_INSTRUCTION = "Find an image-text pair that matches the given query"
PLACEHOLDER = "<|image_1|>"


@dataclass(frozen=True)
class Family:
    """Defines how the rows of a family of sets are converted to inputs.

    Attributes:
        instruction: Column with the instruction that precedes the query text; None: no instruction column.
        fixed: Instruction shared by all queries.
        document: Function from corpus row to text; documents with an empty text are left out.
        images: Folder of the document images below the data folder; None: documents have no images.
    """

    instruction: str | None = None
    fixed: str | None = None
    document: Callable[[Row], str] = lambda row: _titled(row)
    images: str | None = None


def read_corpus_set(root: Path, name: str, files: Mapping[Part, str]) -> list[EvalQuery]:
    """Reads the queries of a set; they share one candidate tuple, the corpus.

    Queries without a relevant document in the corpus are left out with a warning, since no ranking can answer them.

    Args:
        root: The data folder.
        name: Name of the task; its first part selects the family.
        files: Paths of `queries`, `corpus` and, if judgements are stored separately, `qrels`.

    Raises:
        UserError: for a missing file or field, or a judgement that names an unknown document.
    """
    family = FAMILIES.get(name.split("/")[0], Family())
    media = Media(root)
    place: dict[str, int] = {}
    corpus: list[EmbeddingInput] = []
    for where, row in _rows(root / files["corpus"]):
        document = _document(row, family, media, where)
        if document is not None:
            place[_field(row, DOCUMENT_IDS, where)] = len(corpus)
            corpus.append(document)
    candidates = tuple(corpus)
    judged = _judgements(root / files["qrels"]) if "qrels" in files else None
    queries, unanswered = [], 0
    for where, row in _rows(root / files["queries"]):
        own = _own_documents(row, where) if judged is None else judged.get(_field(row, QUERY_IDS, where), {})
        unknown = next((document for document in own if document not in place), None)
        if unknown is not None:
            raise UserError(f"{where}: relevant document {unknown} is not in {root / files['corpus']}")
        if own:
            relevant = tuple(place[document] for document in own)
            queries.append(EvalQuery(_query(row, family, where), candidates, relevant, tuple(own.values())))
        unanswered += not own
    if not queries:
        raise UserError(f"{root / files['queries']}: no query has a relevant document in the corpus")
    if unanswered:
        logger.warning("%s: %d queries have no relevant document and are left out", name, unanswered)
    return queries


def _query(row: Row, family: Family, where: str) -> EmbeddingInput:
    text = next((str(row[name]) for name in QUERY_TEXTS if row.get(name)), "")
    before = (family.fixed or "") if family.instruction is None else str(row.get(family.instruction) or "")
    joined = f"{before} {text}".strip() if before else text
    if not joined:
        raise UserError(f"{where}: query has no text; expected one of {', '.join(QUERY_TEXTS)}")
    return EmbeddingInput(joined)


def _document(row: Row, family: Family, media: Media, where: str) -> EmbeddingInput | None:
    text = family.document(row)
    if family.images is None:
        return EmbeddingInput(text) if text else None
    text = text or f"candidate_id: {_field(row, DOCUMENT_IDS, where)}"
    return EmbeddingInput(f"{PLACEHOLDER}  {text}", (_first_image(row, family.images, media, where),))


def _first_image(row: Row, folder: str, media: Media, where: str) -> ImageRef:
    """Returns the first image of a product that exists locally, matched by the file name in its URL."""
    given = row.get("images") or []
    entries = [given] if isinstance(given, dict | str) else given
    addresses = [
        entry if isinstance(entry, str) else entry.get("url") or entry.get("path") or entry.get("image") or ""
        for entry in entries
    ]
    names = [address.split("?")[0].rpartition("/")[2] for address in addresses]
    found = [media.image(f"{folder}/{name}", where) for name in names if name]
    if not found:
        raise UserError(f"{where}: field images names no image")
    return next((image for image in found if image.exists()), found[0])


def _judgements(file: Path) -> dict[str, dict[str, float]]:
    """Reads the relevance grades above 0, as query id -> document id -> grade."""
    grades: dict[str, dict[str, float]] = {}
    for where, row in _rows(file):
        try:
            score = float(row["label"] if "label" in row else row.get("score", 1))
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: field score is not a number") from error
        if score > 0:
            query, document = _field(row, JUDGED_QUERY, where), _field(row, JUDGED_DOCUMENT, where)
            grades.setdefault(query, {})[document] = score
    return grades


def _own_documents(row: Row, where: str) -> dict[str, float]:
    """Returns the documents listed in a query row: a list of ids or of objects with an `id`, possibly as JSON text."""
    column = next((name for name in OWN_DOCUMENTS if row.get(name)), None)
    if column is None:
        return {}
    value = row[column]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = [value]
    entries = value if isinstance(value, list) else [value]
    names = [entry.get("id") if isinstance(entry, dict) else entry for entry in entries]
    if any(name is None or isinstance(name, list) for name in names):
        raise UserError(f"{where}: field {column}: expected document ids, or objects with an id")
    return {str(name): 1.0 for name in names}


def _titled(row: Row) -> str:
    title, text = row.get("title") or "", row.get("text") or row.get("content") or ""
    return f"{title}\n{text}" if title and text else text


def _tool(row: Row) -> str:
    """Returns a tool's documentation as text; objects are serialized as JSON for uniform whitespace."""
    value = row.get("documentation")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return str(row["documentation"])
    return json.dumps(value) if isinstance(value, dict) else str(value or "")


def _product(row: Row) -> str:
    parts = [(name, _plain(row.get(name))) for name in PRODUCT_FIELDS]
    return "\n".join(f"{name}: {text}" for name, text in parts if text)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(part for part in map(_plain, value) if part)
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    return "" if value is None else str(value).strip()


def _field(row: Row, names: tuple[str, ...], where: str) -> str:
    found = next((row[name] for name in names if row.get(name) not in (None, "")), None)
    if found is None:
        raise UserError(f"{where}: expected one of {', '.join(names)}; found {', '.join(row)}")
    return str(found)


def _rows(file: Path) -> Iterator[tuple[str, Row]]:
    if not file.is_file():
        raise UserError(f"{file}: not found; `vlm2vec data check` prints how to download it")
    if file.suffix == ".parquet":
        for number, row in enumerate(read_parquet(file).to_pylist()):
            yield f"{file}, row {number}", row
        return
    yield from read_json_lines(file)


FAMILIES = {
    "FollowIR": Family(instruction="instruction_og"),
    # As published: the changed instruction is paired with the judgements of the original instruction.
    "InfoSearch": Family(instruction="instruction_changed"),
    "ToolDe": Family(instruction="instruction", document=_tool),
    "MCMR": Family(fixed=PRODUCT_INSTRUCTION, document=_product, images="multi-condition-tasks/MCMR/images"),
}
