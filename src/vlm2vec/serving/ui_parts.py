"""The HTML of the search page: results, details of a result, the model card. Independent of Gradio."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import jinja2
from PIL import Image

from vlm2vec.errors import UserError
from vlm2vec.jobs.indexing import thumbnail
from vlm2vec.jobs.reranking import rerank_hits
from vlm2vec.jobs.searching import PRESETS, Query, Searcher, image_ref, with_images
from vlm2vec.jobs.sheet import card_of, name_of
from vlm2vec.media.images import ImageRef
from vlm2vec.retrieval.metadata import PREFIX, THUMBNAIL
from vlm2vec.retrieval.vector_store import Hit, VectorStore
from vlm2vec.serving.fields import filter_fields, visible

if TYPE_CHECKING:
    from vlm2vec.models.reranking.reranker import Reranker

TEMPLATE = Path(__file__).with_name("templates") / "ui.html.j2"
LARGE = 960
NUM_RERANKED = 50
"""Number of nearest rows that a reranker reads."""
MAX_README = 20_000
MAX_RECENT = 8
ORIGINAL = "vlm2vec/original"
"""Path of the page's endpoint that serves the image of a row."""


@dataclass(frozen=True)
class Answer:
    """New content of the three changing parts of the page; None leaves a part unchanged."""

    status: str | None = None
    detail: str | None = None
    results: str | None = None


class SearchPage:
    """Answers the actions of a visitor.

    Args:
        searcher: The store and its model.
        ranker: Orders the nearest rows by reading each together with the query; None: the order is that of the cosines.
        cosine_weight: See `rerank_hits`.
    """

    def __init__(self, searcher: Searcher, ranker: Reranker | None = None, cosine_weight: float = 0.0) -> None:
        self.searcher, self.store, self.ranker = searcher, searcher.store, ranker
        self.cosine_weight = cosine_weight

    def first(self, k: int) -> Answer:
        """The page before the first search: the first rows of the store."""
        rows = next(self.store.scan(), None)
        hits = (
            [Hit(key, float("nan"), one) for key, one in list(zip(rows.keys, rows.metadata, strict=True))[:k]]
            if rows
            else []
        )
        said = (
            f"{self.store.count():,} rows in this store; showing the first {len(hits)}"
            if hits
            else "This store is empty"
        )
        return Answer(_status(said), "", self._results(hits))

    def search(self, query: Query, k: int, where: str | None, rerank: bool = False) -> Answer:
        """Search; an error is shown as one line and the results stay."""
        if query.image is None and not (query.text or "").strip():
            return Answer(_status("Enter a text, add an image, or both", wrong=True))
        if self.ranker is None or not rerank:
            return self._timed(lambda: self.searcher.search(query, k, where or None), "", "")
        skipped: list[str] = []
        return self._timed(lambda: self._reranked(query, k, where or None, skipped), ", reranked", "", skipped)

    def _reranked(self, query: Query, k: int, where: str | None, skipped: list[str]) -> list[Hit]:
        """The best k of the nearest rows in the order of the reranker; fills in why rows were left out."""
        assert self.ranker is not None
        hits = with_images(self.store, self.searcher.search(query, max(k, NUM_RERANKED), where))
        best, reasons = rerank_hits(self.ranker, query, hits, k, self.cosine_weight)
        skipped += reasons
        return best

    def similar(self, key: str, k: int, where: str | None) -> Answer:
        """Find the rows nearest to a row of the store, with that row shown above them."""
        hit = self._row(key)
        if hit is None:
            return _gone(key)
        return self._timed(lambda: self.searcher.similar(key, k, where or None), f" to {name_of(hit)}", _full(hit))

    def detail(self, key: str) -> Answer:
        """Show one row with all fields."""
        hit = self._row(key)
        return _gone(key) if hit is None else Answer(detail=_full(hit))

    def _row(self, key: str) -> Hit | None:
        rows = self.store.fetch([key])
        return with_images(self.store, [Hit(key, 0.0, rows.metadata[0])])[0] if rows.keys else None

    def _timed(self, find: Callable[[], list[Hit]], of: str, detail: str | None, skipped: Sequence[str] = ()) -> Answer:
        since = time.perf_counter()
        try:
            hits = find()
        except UserError as error:
            return Answer(_status(str(error), wrong=True))
        said = f"{len(hits)} nearest{of}" if hits else "No results"
        said += f" · {1000 * (time.perf_counter() - since):.0f} ms"
        if skipped:
            said += f" · {len(skipped)} left out, without a readable image"
        return Answer(_status(said), detail, self._results(hits))

    def _results(self, hits: Sequence[Hit]) -> str:
        with ThreadPoolExecutor(4) as pool:  # decoding images takes most of the time and releases the GIL
            cards = list(pool.map(card_of, with_images(self.store, list(hits))))
        return _render("results", cards=cards)


def fields_line(store: VectorStore) -> str:
    """The fields that a filter may use."""
    return ", ".join(f"{name} ({kind})" for name, kind in filter_fields(store).items()) or "none"


def model_card(store: VectorStore) -> str:
    """The model and settings of the store's vectors, and the README of the model folder."""
    facts = store.facts
    rows: dict[str, Any] = {
        "model": facts.model,
        "dimensions": facts.dim,
        "storage precision": facts.precision,
        "dtype of the weights": facts.dtype or "default of this machine",
        "instruction for documents": facts.instruction or "none",
        **{f"setting {name}": value for name, value in facts.options.items()},
        "fingerprint": facts.fingerprint,
        "created with": " · ".join(f"{name} {value}" for name, value in facts.about.items() if value) or "not recorded",
        "store": store.uri,
        "rows": f"{store.count():,}",
    }
    readme = Path(facts.model) / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace")[:MAX_README] if readme.is_file() else ""
    return _render("card", rows=rows, readme=text)


def original_image(store: VectorStore, key: str) -> tuple[bytes, str] | None:
    """The image file of a row as it was indexed, and its media type; None for a row without one.

    A page of a PDF and a frame of a video are drawn as JPEG. A file that is gone is replaced by the store's thumbnail.
    """
    rows = store.fetch([key])
    if not rows.keys:
        return None
    kept = with_images(store, [Hit(key, 0.0, rows.metadata[0])])[0].metadata
    own_file = {name: value for name, value in kept.items() if name != THUMBNAIL}
    for image in (image_ref(own_file), image_ref(kept)):
        if image is None:
            continue
        try:
            if image.is_rendered():
                return thumbnail(image, LARGE), "image/jpeg"
            data = image.read()
            with Image.open(io.BytesIO(data)) as opened:
                return data, opened.get_format_mimetype() or "application/octet-stream"
        except (UserError, OSError):
            continue
    return None


def with_recent(past: Sequence[str], text: str) -> list[str]:
    """Recent texts with a new one in front, each once."""
    text = text.strip()
    return [text, *(one for one in past if one != text)][:MAX_RECENT] if text else list(past)


def recent_list(past: Sequence[str]) -> str:
    """The buttons that repeat a recent search."""
    return _render("recent", texts=past) if past else ""


def tasks() -> list[tuple[str, str]]:
    """The tasks of a query as (label, value of `Query.instruction`)."""
    return [("model default", ""), *((f"{name}: {sentence}", name) for name, sentence in PRESETS.items())]


def _status(text: str, wrong: bool = False) -> str:
    return _render("status", text=text, wrong=wrong)


def _gone(key: str) -> Answer:
    return Answer(_status(f"{key}: the row is no longer in the store", wrong=True))


def _full(hit: Hit) -> str:
    image, why = _image(image_ref(hit.metadata))
    facts = visible({name: value for name, value in hit.metadata.items() if name != f"{PREFIX}text"})
    text = str(hit.metadata.get(f"{PREFIX}text", ""))
    file = f"{ORIGINAL}?{urlencode({'key': hit.key})}" if image else ""
    return _render("detail", key=hit.key, name=name_of(hit), image=image, why=why, text=text, facts=facts, file=file)


def _image(image: ImageRef | None) -> tuple[str | None, str]:
    """The image as a data URI, or the reason why it cannot be shown."""
    if image is None:
        return None, ""
    try:
        return "data:image/jpeg;base64," + base64.b64encode(thumbnail(image, LARGE)).decode(), ""
    except UserError as error:
        return None, str(error)


@cache
def _template() -> Any:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text()).module


def _render(part: str, **values: Any) -> str:
    return str(getattr(_template(), part)(**values))
