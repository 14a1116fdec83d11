"""Brings a vector store up to date with a source: encodes new and changed inputs, removes rows whose input is gone.

A row of the store is a record of the source (`vlm2vec.jobs.sources`); its key is the source's path and the record's
key. The field `version` (size and time of the file) shows whether an input may have changed, `digest` (of its content)
whether it did: a file that was moved, copied or touched takes the vector that the store has. A file whose version is
known is not opened. `vlm2vec.jobs.index_writer` encodes and commits the rows.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from PIL import UnidentifiedImageError

from vlm2vec.errors import UserError
from vlm2vec.files import write_text
from vlm2vec.jobs.index_writer import Commits, DocumentEncoder, IndexReport, OpenWriter, Row, Writer
from vlm2vec.jobs.records import Record
from vlm2vec.jobs.sources import Source
from vlm2vec.jobs.state import StoreState
from vlm2vec.media.images import ImageRef, open_image
from vlm2vec.media.text import actual_path, printable
from vlm2vec.retrieval.metadata import THUMBNAIL, own
from vlm2vec.retrieval.vector_store import VectorStore
from vlm2vec.types import EmbeddingInput, content_key

PATH, SOURCE, VERSION, MODALITY, DIGEST, TEXT = own(path="", source="", version="", modality="", digest="", text="")
TEXT_SHOWN = 1000
THUMBNAIL_PIXELS = 512


def index_source(
    encoder: DocumentEncoder | OpenWriter,
    source: Source,
    store: VectorStore,
    *,
    keep_images: bool = False,
    index: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> IndexReport:
    """Brings a store up to date with a source.

    Args:
        encoder: The store's model, or what opens a writer with models elsewhere.
        source: The inputs; rows of other sources are left unchanged.
        store: Opened with `create`, which checks that its model is the encoder's.
        keep_images: Keep a thumbnail of each image in the store, to show results without the files.
        index: Kind of index; None: chosen by the number of rows.
        progress: Called with the number of files (of a folder) or records done since the last call.
    """
    root = source_name(source.path)
    state = StoreState(store)
    report = IndexReport()
    commits, reader = Commits(store, report, state), RecordReader(root, keep_images, report)
    writer = Writer(encoder, commits, reader) if isinstance(encoder, DocumentEncoder) else encoder(commits, reader)
    kept: set[str] = set()
    seen: set[str] = set()
    prefix = f"{root}{'/' if source.path.is_dir() else '#'}"
    for record in _changed(source, root, prefix, state, kept, progress):
        key = prefix + record.key
        known = state.rows.get(key)
        if key in seen:
            report.errors.append((key, "this key appears twice in the source; only its first input is kept"))
        elif known and record.error is None and (known.source, known.version) == (root, record.version):
            kept.add(key)
        else:
            writer.add(key, record)
        seen.add(key)
    writer.flush()
    report.num_same = len(kept)
    gone = {key for key, known in state.rows.items() if known.source == root} - kept - commits.changed
    store.delete(sorted(gone))
    report.num_removed = len(gone)
    report.gone = {name: count for name, count in state.by_source().items() if name != root and _is_gone(name)}
    report.index = store.build_index(index)
    return report


def source_name(path: Path) -> str:
    """Returns the name of a source in a store: its absolute path."""
    return printable(str(path.resolve()))


def write_errors(report: IndexReport, path: Path) -> None:
    """Writes the inputs that could not be read as JSON lines; removes the file of an earlier run if there are none."""
    if report.errors:
        lines = (json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in report.errors)
        write_text(path, "".join(lines))
    else:
        path.unlink(missing_ok=True)


def _is_gone(name: str) -> bool:
    """Whether a source is no longer on this machine; rows that another program wrote name none."""
    return bool(name) and not os.path.lexists(actual_path(name))


def _changed(
    source: Source, root: str, prefix: str, state: StoreState, kept: set[str], progress: Callable[[int], None]
) -> Iterator[Record]:
    """Records of the files that may have changed; keys of files that did not go to `kept`, and nothing is opened."""
    files = source.files()
    for file in files:
        file_key = prefix + source.key_of(file)
        if keys := state.complete(file_key, root, source.version_of(file)):
            kept.update(keys)
        else:
            yield from source.records_of(file)
        progress(1)
    for record in source if not files else ():
        yield record
        progress(1)


class RecordReader:
    """Turns records into rows of the store; what cannot be read is a line in the report."""

    def __init__(self, root: str, keep_images: bool, report: IndexReport) -> None:
        self.root, self.keep_images, self.report = root, keep_images, report
        self.absolute = lru_cache(1024)(_absolute)  # of this run alone: links may change between runs

    def row(self, key: str, record: Record) -> Row | None:
        """A record with its metadata and digest; None if it cannot be read."""
        item = record.item
        if item is None:
            self.report.errors.append((key, record.error or "no input"))
            return None
        try:
            digest, held, size = _look(item)
            about = {SOURCE: self.root, VERSION: record.version, MODALITY: _modality(item), DIGEST: digest}
            metadata = {**record.metadata, **about, **size}
            if item.text:
                metadata[TEXT] = item.text[:TEXT_SHOWN]
            if path := (item.images and item.images[0].path) or actual_path(metadata.get(PATH) or ""):
                metadata[PATH] = self.absolute(path)
            if item.images:
                first = item.images[0]
                metadata |= own(member=printable(first.member) if first.member else None)
                if self.keep_images or first.data is not None:
                    metadata[THUMBNAIL] = thumbnail(held.images[0])
        except UserError as error:
            self.report.errors.append((key, printable(str(error))))
            return None
        return Row(key, held, metadata, digest)


def _absolute(path: str) -> str:
    """An absolute path without links."""
    return printable(os.path.realpath(path))


def _modality(item: EmbeddingInput) -> str:
    if item.video is not None:
        return "video"
    return ("both" if item.text else "image") if item.images else "text"


def _look(item: EmbeddingInput) -> tuple[str, EmbeddingInput, dict[str, int]]:
    """Reads an input's images once: a digest of the content, the input with the bytes in it, its first image's size.

    A page, a frame and a video are identified by their file and place in it. They are not drawn here, so their bytes
    are not held and their size is not known.

    Raises:
        UserError: if an image is missing or not readable.
    """
    if not item.images:
        return content_key(item).hex()[:32], item, {}
    images = tuple(image if image.is_rendered() else replace(image, data=image.read()) for image in item.images)
    held = replace(item, images=images)
    size = {} if images[0].is_rendered() else _size_of(images[0])
    return content_key(held).hex()[:32], held, size


def _size_of(image: ImageRef) -> dict[str, int]:
    try:
        with open_image(image.read(), str(image.path or "")) as opened:
            return own(width=opened.width, height=opened.height)
    except UserError as error:
        raise UserError(f"{image}: {error}") from error
    except UnidentifiedImageError as error:  # its message names an object in memory
        raise UserError(f"{image}: not a readable image (unknown format); replace or remove it") from error
    except Exception as error:  # Pillow's parsers raise anything on a damaged file (struct.error, KeyError, …)
        raise UserError(f"{image}: not a readable image ({error}); replace or remove it") from error


def thumbnail(image: ImageRef, size: int = THUMBNAIL_PIXELS) -> bytes:
    """A JPEG of an image, at most `size` pixels wide and high."""
    small = image.load()
    small.thumbnail((size, size))
    encoded = io.BytesIO()
    small.save(encoded, format="JPEG", quality=85)
    return encoded.getvalue()
