"""The HTML page of a report: one file that contains its images and loads nothing."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from PIL import Image

from vlm2vec.charts import Chart, line_chart, ticks
from vlm2vec.evaluation.comparison import Comparison, ComparisonRow, percent
from vlm2vec.evaluation.evaluate import Sample, TaskResult
from vlm2vec.media.images import ImageRef
from vlm2vec.media.text import breakable
from vlm2vec.types import EmbeddingInput

TEMPLATE = Path(__file__).with_name("templates") / "report.html.j2"
QUERY_PIXELS = 240
CANDIDATE_PIXELS = 160
MOST_CARDS = 90
"""Cards on a page, about 4 MB; with more tasks, each task shows fewer of its samples."""
MOST_TEXT = 280
SMALL_CUTS = ("hit@1", "hit@5", "hit@10")
PLACEHOLDER = re.compile(r"<\|(?:image|video)_\d+\|>")


@dataclass(frozen=True)
class InlineImage:
    """An inlined image."""

    uri: str
    alt: str
    width: int
    height: int
    file: str = ""
    """Address of the original file, relative to the page; empty for a member of an archive."""


@dataclass(frozen=True)
class Shown:
    """An input, ready for display."""

    images: list[InlineImage]
    text: str


@dataclass(frozen=True)
class Card:
    """A query and its best candidates."""

    query: Shown
    candidates: list[tuple[Shown, str, bool]]
    """(candidate, score with its name, is it gold), best first."""
    gold: Shown | None
    """The relevant candidate, if it is not among the candidates shown."""
    is_hit: bool
    verdict: str


@dataclass
class Thumbnails:
    """Small copies of images as data URIs, each made once.

    Attributes:
        folder: The folder of the page, from which links to the original files start; None: no links.
    """

    folder: Path | None = None
    made: dict[tuple[ImageRef, int], InlineImage] = field(default_factory=dict)

    def get(self, image: ImageRef, pixels: int) -> InlineImage:
        """The image at most `pixels` wide and high."""
        key = (image, pixels)
        if key not in self.made:
            small = image.load()
            small.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
            encoded = io.BytesIO()
            small.save(encoded, format="WEBP", quality=70, method=4)
            uri = "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()
            # The stem only, so that a shared page does not reveal folder names.
            alt = Path(image.member or image.path or "image").stem
            self.made[key] = InlineImage(uri, alt, small.width, small.height, self._link(image))
        return self.made[key]

    def _link(self, image: ImageRef) -> str:
        """A relative address, so that a page that is shared names no folders above the common one."""
        if self.folder is None or not image.path or image.member:
            return ""
        return quote(os.path.relpath(Path(image.path).absolute(), self.folder.absolute()))


def render_page(
    title: str,
    comparison: Comparison,
    results: Sequence[TaskResult],
    loss_curves: Mapping[str, Sequence[Mapping[str, Any]]],
    facts: Sequence[tuple[str, str]],
    opening: Sequence[str] = (),
    folder: Path | None = None,
) -> str:
    """The whole page.

    Args:
        title: Heading.
        comparison: The runs side by side.
        results: Task results of the last run, whose samples are shown.
        loss_curves: Training log by run.
        facts: (name, value) for the end of the page.
        opening: Sentences below the heading: model, recipe, date.
        folder: The folder of the page, for links to the original images; None: no links.

    Raises:
        UserError: if an image cannot be read.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = percent
    environment.filters["breakable"] = breakable
    thumbnails = Thumbnails(folder)
    per_task = max(1, MOST_CARDS // max(len(results), 1))
    tasks = [(result, [_card(one, thumbnails) for one in _spread(_samples(result), per_task)]) for result in results]
    overall = next((row for row in comparison.rows if row.name == "overall" and row.is_group), None)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        opening=opening,
        comparison=comparison,
        overall=overall,
        scale=_scale(overall),
        anchors={result.task.name: f"task-{i}" for i, result in enumerate(results, start=1)},
        tasks=tasks,
        cuts=SMALL_CUTS,
        chart=loss_chart(loss_curves),
        facts=facts,
    )


def _scale(overall: ComparisonRow | None) -> list[float]:
    """Ticks in percent, from 0 to the first at or above the largest bar."""
    known = [score for score in (overall.chance, *overall.scores) if score is not None] if overall else []
    return ticks(0, 100 * max(known)) if known else []


def _samples(result: TaskResult) -> list[Sample]:
    """The queries that are shown, in the order of the last stage."""
    return result.reranked.samples if result.reranked else result.samples


def _spread(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most that many samples, spread evenly."""
    if len(samples) <= most:
        return list(samples)
    return [samples[i * len(samples) // most] for i in range(most)]


def loss_chart(loss_curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Chart | None:
    """The loss curves in one plot; None if no run has a loss.

    Args:
        loss_curves: By run, entries with `step` and `loss`; entries without both, or with a non-finite loss, are
            skipped.
    """
    return line_chart(
        {
            name: [(float(e["step"]), float(e["loss"])) for e in entries if "step" in e and "loss" in e]
            for name, entries in loss_curves.items()
        }
    )


def _card(sample: Sample, thumbnails: Thumbnails) -> Card:
    candidates = [candidate for candidate, _, _ in sample.top]
    # A text that every image shares, such as "Represent the given image.", is not shown.
    texts = {_text(candidate) for candidate in (*candidates, sample.gold)}
    bare = len(texts) == 1
    place = next((i for i, (_, _, is_gold) in enumerate(sample.top, start=1) if is_gold), None)
    is_hit, verdict = _verdict(sample, place)
    return Card(
        _shown(sample.query, thumbnails, QUERY_PIXELS),
        [
            (_shown(item, thumbnails, CANDIDATE_PIXELS, bare), f"{sample.measure} {score:.4f}", gold)
            for item, score, gold in sample.top
        ],
        None if place else _shown(sample.gold, thumbnails, CANDIDATE_PIXELS, bare),
        is_hit,
        verdict,
    )


def _verdict(sample: Sample, place: int | None) -> tuple[bool, str]:
    """Whether the sample is a hit, where ties are misses as in the score."""
    if place is None:
        return False, f"Miss: the gold is not among the first {len(sample.top)}"
    gold_score = sample.top[place - 1][1]
    if all(is_gold or score < gold_score for _, score, is_gold in sample.top):
        return True, "Hit: the gold is first"
    if place == 1:
        return False, "Miss: another candidate ties with the gold"
    return False, f"Miss: the gold is number {place}"


def _shown(item: EmbeddingInput, thumbnails: Thumbnails, pixels: int, bare: bool = False) -> Shown:
    """An input for the page; `bare` leaves out the text beside an image."""
    frames = item.video.frames if item.video is not None else ()
    images = [thumbnails.get(image, pixels) for image in (*frames, *item.images)]
    return Shown(images, "" if bare and images else _text(item))


def _text(item: EmbeddingInput) -> str:
    parts = (item.instruction, PLACEHOLDER.sub(" ", item.text or ""))
    text = " ".join(" ".join(part.split()) for part in parts if part).strip()
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1].rstrip()}…"
