"""Results as one HTML page with small copies of the images inside: nothing to fetch, can be sent to someone."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from vlm2vec.errors import UserError
from vlm2vec.jobs.indexing import STATE, thumbnail
from vlm2vec.jobs.searching import image_ref
from vlm2vec.media.images import ImageRef
from vlm2vec.retrieval.vector_store import IMAGE, Hit

TEMPLATE = Path(__file__).with_name("templates") / "sheet.html.j2"
PIXELS = 320
MOST_TEXT = 280
PLAIN = (*STATE, IMAGE, "path", "member", "text", "modality", "kind")


@dataclass(frozen=True)
class Card:
    """A hit as the page shows it."""

    name: str
    place: str
    score: str
    image: str | None
    text: str
    about: str


def write_sheet(
    path: Path, title: str, sections: Sequence[tuple[str, Sequence[Hit]]], query: ImageRef | None = None
) -> None:
    """Writes a page of images with scores.

    Args:
        path: Of the HTML file; replaced whole.
        title: What was looked for.
        sections: Heading and hits; an empty heading is not shown.
        query: The image that was looked for.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text()).render(
        title=title,
        query=_data_uri(query) if query else None,
        sections=[(heading, [card_of(hit) for hit in hits]) for heading, hits in sections],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(page, encoding="utf-8")
    beside.replace(path)


def card_of(hit: Hit) -> Card:
    """What is shown of a hit; an image that is gone is left out and said."""
    about = {name: value for name, value in hit.metadata.items() if name not in PLAIN}
    text = str(hit.metadata.get("text", ""))[:MOST_TEXT]
    image = None
    if ref := image_ref(hit.metadata):
        try:
            image = _data_uri(ref)
        except UserError as error:
            text = str(error)
    facts = " · ".join(f"{name} {value}" for name, value in about.items())
    return Card(name_of(hit), hit.key, f"{hit.score:.3f}", image, text, facts)


def name_of(hit: Hit) -> str:
    """What a row is called: its own title or name, or the end of its key."""
    return str(hit.metadata.get("title") or hit.metadata.get("name") or hit.key.rpartition("/")[2])


def _data_uri(image: ImageRef) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(thumbnail(image, PIXELS)).decode()
