"""Pictures with words for the alignment of `compact`: OpenClipart titles, emoji names, questions.

OpenClipart (public domain) comes as Debian packages `openclipart-png` and `openclipart-svg`, unpacked to one folder.
Emoji names and questions come from the training half of the demo benchmark. No caption holds a held-out name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from vlm2vec.errors import UserError
from vlm2vec.images import ImageRef

SKIPPED_FOLDERS = {"computer", "shapes", "special", "buttons", "signs_and_symbols", "logos"}
NAME_PROMPT = "What is it?"
TITLE = re.compile(r"<dc:title>([^<]+)</dc:title>")


@dataclass(frozen=True, slots=True)
class Caption:
    """A picture, what is asked about it, and the words that answer."""

    image: ImageRef
    prompt: str
    answer: str


def clipart_captions(root: Path) -> Iterator[Caption]:
    """Titles of OpenClipart drawings.

    Raises:
        UserError: if `root` does not hold the two unpacked packages.
    """
    base = root / "usr/share/openclipart"
    if not (base / "png").is_dir() or not (base / "svg").is_dir():
        raise UserError(
            f"{root}: no OpenClipart there; unpack the Debian packages openclipart-png and openclipart-svg into it"
        )
    for picture in sorted((base / "png").rglob("*.png")):
        relative = picture.relative_to(base / "png")
        drawing = (base / "svg" / relative).with_suffix(".svg")
        if picture.is_symlink() or relative.parts[0] in SKIPPED_FOLDERS or not drawing.is_file():
            continue
        head = drawing.read_text(encoding="utf-8", errors="replace")
        title = TITLE.search(head)
        if title and (name := _clean(title.group(1))):
            yield Caption(ImageRef(path=str(picture)), NAME_PROMPT, name)


def demo_captions(root: Path) -> Iterator[Caption]:
    """Names of single emoji, and questions on what is where in composed pictures, from the demo's training half."""
    for subset, question in (("EmojiName", NAME_PROMPT), ("EmojiVQA", None)):
        for row in pq.read_table(root / "train" / subset).to_pylist():
            folder, _, member = row["qry_image_path"].partition("/")
            assert folder == "images"
            archive = root / "train/images_zip" / f"{member.split('/')[0]}.zip"
            asked = question or row["qry"].split("question: ", 1)[1].strip()
            if asked == NAME_PROMPT or asked.endswith("corner?"):  # questions that no other name stands in
                yield Caption(ImageRef(path=str(archive), member=member), asked, row["pos_text"])


def without_names(captions: Iterator[Caption], root: Path) -> list[Caption]:
    """Leaves out every caption with a held-out name of the demo benchmark in it, as whole words."""
    held_out = json.loads((root / "names.json").read_text())["held_out"]
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(held_out, key=len, reverse=True))) + r")s?\b")
    return [caption for caption in captions if not pattern.search(caption.answer.lower())]


def _clean(words: str) -> str:
    """Lower case, plain words; empty for file-like, foreign or overlong ones."""
    words = re.sub(r"[_\-]+", " ", words).strip().lower()
    words = re.sub(r"\s*\b(v|version|nr|no)?\.?\s*\d+$", "", words).strip()
    return words if re.fullmatch(r"[a-z][a-z ',.&()]{2,50}", words) else ""
