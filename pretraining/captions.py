"""Named drawings and definitions for the pretraining of `compact`.

Named drawings come from OpenClipart (public domain; Debian packages `openclipart-png` and `openclipart-svg`), from the
Tux Paint stamps (GPL-2; `tuxpaint-stamps-default`) and from the emoji in the training half of the demo benchmark.
Definitions come from WordNet (`wordnet-base`). `HeldOut` finds the held-out names of the demo benchmark in a text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.parquet as pq

from vlm2vec.data.emoji.prepare import held_out_names
from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef

SKIPPED_FOLDERS = {"computer", "shapes", "special", "buttons", "signs_and_symbols", "logos"}
TITLE = re.compile(r"<dc:title>([^<]+)</dc:title>")
SUBJECT = re.compile(r"<dc:subject>(.*?)</dc:subject>", re.DOTALL)
KEYWORD = re.compile(r"<rdf:li>([^<]+)</rdf:li>")
NAME_PROMPTS = ("What is it?", "What is shown?", "Name it.", "Caption:", "Describe the picture.", "This is")


@dataclass(frozen=True, slots=True)
class Drawing:
    """A single drawing: its source, its name and its keywords."""

    source: str
    image: ImageRef
    name: str
    keywords: tuple[str, ...] = field(default=())


def clipart(root: Path) -> Iterator[Drawing]:
    """Yields the OpenClipart drawings that have a title, with their keywords.

    Raises:
        UserError: if `root` does not contain the two unpacked packages.
    """
    base = root / "usr/share/openclipart"
    if not (base / "png").is_dir() or not (base / "svg").is_dir():
        raise UserError(
            f"{root}: OpenClipart not found; unpack the Debian packages openclipart-png and openclipart-svg there"
        )
    for image in sorted((base / "png").rglob("*.png")):
        relative = image.relative_to(base / "png")
        drawing = (base / "svg" / relative).with_suffix(".svg")
        if image.is_symlink() or relative.parts[0] in SKIPPED_FOLDERS or not drawing.is_file():
            continue
        head = drawing.read_text(encoding="utf-8", errors="replace")
        title, subject = TITLE.search(head), SUBJECT.search(head)
        if title and (name := clean(title.group(1))):
            found = [clean(word) for word in KEYWORD.findall(subject.group(1))] if subject else []
            yield Drawing("clipart", ImageRef(path=str(image)), name, tuple(dict.fromkeys(filter(None, found)))[:6])


def stamps(root: Path) -> Iterator[Drawing]:
    """Yields the Tux Paint stamps, many of them cut-out photographs, with their English captions.

    Raises:
        UserError: if `root` does not contain the unpacked package.
    """
    base = root / "usr/share/tuxpaint/stamps"
    if not base.is_dir():
        raise UserError(f"{root}: Tux Paint stamps not found; unpack the Debian package tuxpaint-stamps-default there")
    for image in sorted(base.rglob("*.png")):
        words = image.with_suffix(".txt")
        if words.is_file() and not image.stem.endswith("_mirror"):
            name = clean(words.read_text(encoding="utf-8", errors="replace").splitlines()[0])
            if name := re.sub(r"^(an?|the) ", "", name):
                folders = image.relative_to(base).parts[:-1]
                yield Drawing("stamps", ImageRef(path=str(image)), name, tuple(filter(None, map(clean, folders))))


def emoji(root: Path) -> Iterator[Drawing]:
    """Yields the single emoji in the training half of the demo benchmark, including their skin tones."""
    names: dict[str, str] = {}
    for row in pq.read_table(root / "train/EmojiName").to_pylist():
        image = _member(root, row["qry_image_path"])
        names[Path(str(image.member)).stem] = row["pos_text"]
        yield Drawing("emoji", image, row["pos_text"])
    for row in pq.read_table(root / "train/EmojiEdit").to_pylist():
        tone = row["qry"].split("change: with ", 1)[1].strip()
        base = names[Path(row["qry_image_path"]).stem]
        yield Drawing("tones", _member(root, row["pos_image_path"]), f"{base} with {tone}", (base, tone))


def wordnet_lines(root: Path, part: str) -> Iterator[tuple[list[str], str]]:
    """Yields the synsets of a part of speech as (data fields, gloss).

    Raises:
        UserError: if `root` does not contain the unpacked package.
    """
    base = root / "usr/share/wordnet"
    if not base.is_dir():
        raise UserError(f"{root}: WordNet not found; unpack the Debian package wordnet-base there")
    for line in (base / f"data.{part}").read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):  # the licence lines are indented
            data, _, gloss = line.partition(" | ")
            yield data.split(), gloss


def definitions(root: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yields WordNet's words with their definition and examples.

    Raises:
        UserError: if `root` does not contain the unpacked package.
    """
    for part in ("noun", "verb", "adj"):
        for fields, gloss in wordnet_lines(root, part):
            lemma = re.sub(r"\(.*\)", "", fields[4]).replace("_", " ").lower()
            meaning = gloss.split('; "')[0].strip()
            if re.fullmatch(r"[a-z' -]{3,30}", lemma) and len(meaning) < 110:
                yield lemma, meaning, re.findall(r'"([^"]{10,90})"', gloss)


class HeldOut:
    """Detects held-out names of the demo benchmark in a text, as whole words, singular or plural."""

    def __init__(self, demo: Path) -> None:
        names = sorted(held_out_names(demo), key=len, reverse=True)
        self._pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")(s|es)?\b")

    def __contains__(self, words: str) -> bool:
        return self._pattern.search(words.lower()) is not None

    def known(self, drawings: Iterable[Drawing]) -> list[Drawing]:
        """Returns the drawings whose name is not held out, without held-out keywords."""
        return [
            replace(drawing, keywords=tuple(word for word in drawing.keywords if word not in self))
            for drawing in drawings
            if drawing.name not in self
        ]


def clean(words: str) -> str:
    """Normalizes a title to lower-case words; returns "" for file names, other scripts and overlong titles."""
    words = re.sub(r"[_\-]+", " ", words).strip().lower().rstrip(".")
    words = re.sub(r"\s*\b(v|version|nr|no)?\.?\s*\d+$", "", words).strip()
    return words if re.fullmatch(r"[a-z][a-z ',.&()]{2,50}", words) else ""


def _member(root: Path, path: str) -> ImageRef:
    member = path.removeprefix("images/")
    return ImageRef(path=str(root / "train/images_zip" / f"{member.split('/')[0]}.zip"), member=member)
