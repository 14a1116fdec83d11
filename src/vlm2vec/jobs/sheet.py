"""Results as one HTML file with thumbnails inside, which can be sent to someone."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from vlm2vec.errors import UserError
from vlm2vec.files import write_text
from vlm2vec.jobs.indexing import thumbnail
from vlm2vec.jobs.searching import image_ref, is_missing
from vlm2vec.media.images import ImageRef
from vlm2vec.media.text import actual_path, breakable
from vlm2vec.retrieval.metadata import PREFIX, is_own
from vlm2vec.retrieval.vector_store import Hit

TEMPLATE = Path(__file__).with_name("templates") / "sheet.html.j2"
PIXELS = 320
MOST_TEXT = 280
SHOWN = tuple(f"{PREFIX}{name}" for name in ("width", "height", "page", "seconds", "line", "row"))
"""Fields of this package that a card shows, beside the user's own."""


@dataclass(frozen=True)
class Card:
    """A search result on the page."""

    name: str
    place: str
    score: str
    image: str | None
    text: str
    about: str
    link: str = ""


def write_sheet(
    path: Path, title: str, sections: Sequence[tuple[str, Sequence[Hit]]], query: ImageRef | None = None
) -> None:
    """Writes a page of images with scores.

    Args:
        path: The HTML file; replaced atomically.
        title: The query.
        sections: Pairs of a heading and hits; an empty heading is not shown.
        query: The image of the query.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["breakable"] = breakable
    page = environment.from_string(TEMPLATE.read_text()).render(
        title=title,
        query=_data_uri(query) if query else None,
        sections=[(heading, [card_of(hit, path.parent) for hit in hits]) for heading, hits in sections],
    )
    write_text(path, page)


def card_of(hit: Hit, folder: Path | None = None) -> Card:
    """A hit as a card; an image that cannot be read is left out and its error shown.

    Args:
        hit: A row of a store.
        folder: Folder of the page, for a link to the row's file; None: no link.
    """
    text = str(hit.metadata.get(f"{PREFIX}text", ""))[:MOST_TEXT]
    image = None
    if ref := image_ref(hit.metadata):
        try:
            image = _data_uri(ref)
        except UserError as error:
            text = str(error)
    facts = " · ".join(f"{name} {value}" for name, value in shown_fields(hit).items())
    if is_missing(hit.metadata):
        facts = f"file not found · {facts}".removesuffix(" · ")
    return Card(name_of(hit), hit.key, f"{hit.score:.3f}", image, text, facts, link_of(hit, folder) if folder else "")


def link_of(hit: Hit, folder: Path) -> str:
    """Address of a row's file relative to the folder of a page; "" for a row without a file."""
    path = hit.metadata.get(f"{PREFIX}path")
    return quote(os.path.relpath(Path(actual_path(str(path))).absolute(), folder.absolute())) if path else ""


def shown_fields(hit: Hit) -> dict[str, Any]:
    """The fields of a hit that a person reads: the user's, and those of `SHOWN` without the prefix."""
    fields = {name: value for name, value in hit.metadata.items() if not is_own(name)}
    ours = {name.removeprefix(PREFIX): hit.metadata[name] for name in SHOWN if name in hit.metadata}
    return {**ours, **fields}


def name_of(hit: Hit) -> str:
    """Returns the title of a hit: its field `title` or `name`, or the last part of its key."""
    return str(hit.metadata.get("title") or hit.metadata.get("name") or hit.key.rpartition("/")[2])


def _data_uri(image: ImageRef) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(thumbnail(image, PIXELS)).decode()
