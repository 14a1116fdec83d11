r"""Photographs with descriptions from OpenStax's textbooks, whose sources are public git repositories.

    git clone https://github.com/openstax/osbooks-psychology CLONES/osbooks-psychology   # and the other books
    python -m pretraining.photographs CLONES FOLDER

The books were published under CC BY 4.0. Several are under CC BY-NC-SA now; of those the last commit under CC BY 4.0 is
read. Figures whose credit names a license that forbids commercial use or changes are left out. Writes the images, at
most 384 pixels on a side, and `photographs.jsonl`: image, book, commit and texts of each.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlm2vec.errors import UserError
from vlm2vec.files import write_text

LIST = "photographs.jsonl"
SIDE, SMALLEST = 384, 120
MAX_WHITE, MIN_COLORS = 0.35, 300  # a diagram has a white ground or few colors
LICENSED = b"Attribution 4.0 International"
MEDIA = re.compile(r'<media\b[^>]*?alt="([^"]*)"[^>]*>(.*?)</media>', re.DOTALL)
FIGURE = re.compile(r"<figure.*?</figure>", re.DOTALL)
CAPTION = re.compile(r"<caption[^>]*>(.*?)</caption>", re.DOTALL)
SOURCE = re.compile(r'src="[./]*media/([^"]+)"')
DIAGRAM = re.compile(
    r"\b(graph|chart|diagram|equation|table|screenshot|map|illustration|drawing|flowchart|plot|axis|axes|schematic|x-ray"
    r"|micrograph|formula|cartoon|logo|venn|timeline|structure|arrows?|labeled|engraving|lithograph)\b",
    re.IGNORECASE,
)
OTHER_LICENSE = re.compile(r"NC\b|NonCommercial|-ND\b|NoDeriv|permission|all rights reserved|fair use|©", re.IGNORECASE)
LEAD = re.compile(
    r"^(this |the |an? )?((color|colour|black[- ]and[- ]white|aerial|close-?up|recent|second|left|vintage|large|old) )*"
    r"(photo(graph)?s?|image|picture|figure|painting|part [a-d])"
    r"( (is|are))?( (of|shows that|shows|showing|depicts|depicting|features|from|taken of))?:? *",
    re.IGNORECASE,
)
CREDIT = re.compile(r"\((credit|attribution|source|modification|image|photo).*", re.IGNORECASE | re.DOTALL)
SENTENCE_END = re.compile(r"(?<=[a-z]{2}[.?!])\s")


@dataclass(frozen=True, slots=True)
class Photograph:
    """An image file of the folder and what is said of it, from the whole description to a caption."""

    image: str
    book: str
    commit: str
    texts: list[str]


@dataclass(frozen=True, slots=True)
class Figure:
    """An image of a book's `media` folder, its description for the blind, and its caption with the credit."""

    name: str
    description: str
    caption: str


def git(clone: Path, *arguments: str, given: bytes = b"") -> bytes:
    """Output of a git command in a clone; empty if it fails."""
    command = ["git", "-C", str(clone), *arguments]
    return subprocess.run(command, input=given, capture_output=True, check=False).stdout


def free_commit(clone: Path) -> str:
    """The newest commit of a book that is under CC BY 4.0.

    Raises:
        UserError: if there is none.
    """
    changes = git(clone, "log", "--format=%H", "--", "LICENSE").decode().split()
    for commit in ["HEAD", *(f"{change}^" for change in changes)]:
        if git(clone, "show", f"{commit}:LICENSE").startswith(LICENSED):
            return git(clone, "rev-parse", commit).decode().strip()
    raise UserError(f"{clone}: no commit of this clone is under CC BY 4.0; clone it with its history")


def read_book(clone: Path, commit: str) -> dict[str, bytes]:
    """Pages and images of a book by their path, read in one git process; files that the clone lacks are left out."""
    rows = git(clone, "ls-tree", "-r", "-z", commit, "modules/", "media/").decode().split("\0")
    names = [row.partition("\t")[2] for row in rows if row]
    objects = io.BytesIO(
        git(clone, "cat-file", "--batch", given="".join(f"{row.split()[2]}\n" for row in rows if row).encode())
    )
    files = {}
    for name in names:
        about = objects.readline().split()
        if about[1:] != [b"missing"]:
            files[name] = objects.read(int(about[2]))
            objects.readline()
    return files


def figures(pages: Iterable[bytes]) -> Iterator[Figure]:
    """The described figures of a book that look like photographs by their words and are free to use."""
    for page in (data.decode("utf-8", "replace") for data in pages):
        captions = {match.span(): CAPTION.search(match.group()) for match in FIGURE.finditer(page)}
        for media in MEDIA.finditer(page):
            inside = (text for (start, end), text in captions.items() if start <= media.start() < end)
            caption = next(inside, None)
            figure = Figure(
                next(iter(SOURCE.findall(media.group(2))), ""),
                plain(media.group(1)),
                plain(caption.group(1)) if caption else "",
            )
            free = not OTHER_LICENSE.search(figure.caption)
            if figure.name and len(figure.description) >= 15 and free and not DIAGRAM.search(figure.description):
                yield figure


def plain(markup: str) -> str:
    """The words of a piece of XML, in one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", markup)).split())


def texts_of(figure: Figure) -> list[str]:
    """What a figure is trained with: its description, the first sentence of it, and the first of its caption."""
    words = re.sub(r"\s*\(([a-d]|left|right|top|bottom)\)", "", figure.description)
    without_lead = re.sub(r" (is|are) (shown|pictured|depicted)\b", "", LEAD.sub("", words)).strip(" ,.:")
    description = (without_lead if len(without_lead) > 8 else words)[:300]
    caption = SENTENCE_END.split(CREDIT.sub("", re.sub(r"\([a-d]\)", "", figure.caption)).strip())[0][:200]
    texts = [description, SENTENCE_END.split(description)[0], caption]
    return [text[:1].upper() + text[1:] for text in texts if len(text) > 8]


def read_photograph(data: bytes) -> Image.Image | None:
    """A figure's image, made small. None if it cannot be read, is tiny, or is a diagram by its colors."""
    try:
        opened = Image.open(io.BytesIO(data))
        opened.draft("RGB", (SIDE, SIDE))  # a JPEG is then decoded at an eighth of its size at best
        image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    image.thumbnail((SIDE, SIDE))
    pixels = np.asarray(image)
    white = (pixels.min(axis=-1) > 235).mean()
    colors = len(np.unique(pixels // 8 @ np.array([1024, 32, 1])))  # 32 levels a channel
    return image if min(image.size) >= SMALLEST and white <= MAX_WHITE and colors >= MIN_COLORS else None


def write_book(clone: Path, folder: Path, seen: set[str]) -> Iterator[Photograph]:
    """Writes the photographs of a book that no book before it had; `seen` holds the digests of their files."""
    commit = free_commit(clone)
    files = read_book(clone, commit)
    for figure in figures(data for name, data in files.items() if name.endswith(".cnxml")):
        data, texts = files.get(f"media/{figure.name}", b""), texts_of(figure)
        digest = hashlib.sha256(data).hexdigest()
        if not data or digest in seen or not texts:
            continue
        seen.add(digest)
        if image := read_photograph(data):
            path = f"{digest[:16]}.jpg"
            image.save(folder / path, quality=90)
            yield Photograph(path, clone.name, commit, texts)


def main(clones: str, folder: str) -> None:
    """Writes the photographs of all books and their list."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    found = []
    for clone in sorted(path for path in Path(clones).iterdir() if path.is_dir()):
        rows = list(write_book(clone, Path(folder), seen))
        print(f"{clone.name}: {len(rows)} photographs", flush=True)
        found += rows
    write_text(Path(folder) / LIST, "".join(json.dumps(asdict(row)) + "\n" for row in found))


if __name__ == "__main__":
    main(*sys.argv[1:])
