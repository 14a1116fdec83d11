"""Brings a vector store up to date with a source: encodes new and changed inputs, removes rows whose input is gone.

A row of the store is a record of the source (`vlm2vec.jobs.sources`); its key is the source's path and the record's
key. The field `version` (size and time of the file) shows whether an input may have changed, `digest` (of its content)
whether it did: a file that was moved, copied or touched takes the vector that the store has. A file whose version is
known is not opened. Rows are written in parts of at most 4,096 rows or about 30 seconds, so a killed process loses at
most one part and the next run resumes.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import UnidentifiedImageError

from vlm2vec.errors import UserError
from vlm2vec.files import write_text
from vlm2vec.jobs.records import Record
from vlm2vec.jobs.sources import Source
from vlm2vec.jobs.state import STATE, StoreState
from vlm2vec.media.images import ImageRef, open_image
from vlm2vec.media.text import actual_path, printable
from vlm2vec.retrieval.metadata import PREFIX, THUMBNAIL, own
from vlm2vec.retrieval.vector_store import IndexFacts, VectorStore
from vlm2vec.types import EmbeddingInput, content_key

FIRST_PART, PART = 16, 4096
"""Rows of the first commit and the most of a commit, whose cost grows with the number of commits before it."""
ENCODED_AT_ONCE = 512
PATH = f"{PREFIX}path"
COMMIT_SECONDS = 30.0
"""Time between two commits: the size of a part follows the encoder's speed, from `FIRST_PART` up to `PART` rows."""
PART_BYTES = 256 << 20  # of encoded images that wait to be encoded
TEXT_SHOWN = 1000
THUMBNAIL_PIXELS = 512


class DocumentEncoder(Protocol):
    """Computes the vectors."""

    def encode_document(self, inputs: Sequence[EmbeddingInput], **kwargs: Any) -> np.ndarray:
        """Unit-norm vectors [N, D] in input order; `on_error(position, error)` is called for an unreadable input."""
        ...


@dataclass
class IndexReport:
    """The changes that a run made.

    Attributes:
        num_new, num_changed: Rows written. `num_encoded` of them were encoded; the content of the others was known.
        num_same: Rows that were up to date.
        num_removed: Rows whose input is gone or can no longer be read.
        errors: (key, reason) of inputs that could not be read.
        gone: Other sources in the store whose path no longer exists, with the number of their rows.
        index: How the store is searched now.
    """

    num_new: int = 0
    num_changed: int = 0
    num_encoded: int = 0
    num_same: int = 0
    num_removed: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)
    gone: dict[str, int] = field(default_factory=dict)
    index: IndexFacts = field(default_factory=lambda: IndexFacts("exact", "not determined"))


@dataclass
class _Row:
    """A record on its way into the store; `item` holds the images' bytes, so that they are read once."""

    key: str
    item: EmbeddingInput
    metadata: dict[str, Any]
    digest: str
    vector_D: np.ndarray | None = None

    def num_bytes(self) -> int:
        """Bytes of images held."""
        return sum(len(image.data) for image in self.item.images if image.data is not None)


def index_source(
    encoder: DocumentEncoder,
    source: Source,
    store: VectorStore,
    *,
    keep_images: bool = False,
    index: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> IndexReport:
    """Brings a store up to date with a source.

    Args:
        encoder: The store's model.
        source: The inputs; rows of other sources are left unchanged.
        store: Opened with `create`, which checks that its model is the encoder's.
        keep_images: Keep a thumbnail of each image in the store, to show results without the files.
        index: Kind of index; None: chosen by the number of rows.
        progress: Called with the number of files (of a folder) or records done since the last call.
    """
    root = source_name(source.path)
    state = StoreState(store)
    report = IndexReport()
    writer, maker = _Writer(encoder, store, report, state), _RowMaker(root, keep_images, report)
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
        elif row := maker.row(key, record):
            writer.add(row)
        seen.add(key)
    writer.flush()
    report.num_same = len(kept)
    gone = {key for key, known in state.rows.items() if known.source == root} - kept - writer.changed
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


class _RowMaker:
    """Turns records into rows of the store; what cannot be read is a line in the report."""

    def __init__(self, root: str, keep_images: bool, report: IndexReport) -> None:
        self.root, self.keep_images, self.report = root, keep_images, report
        self.absolute = lru_cache(1024)(_absolute)  # of this run alone: links may change between runs

    def row(self, key: str, record: Record) -> _Row | None:
        """A record with its metadata and digest; None if it cannot be read."""
        item = record.item
        if item is None:
            self.report.errors.append((key, record.error or "no input"))
            return None
        try:
            digest, held, size = _look(item)
            about = own(source=self.root, version=record.version, modality=_modality(item), digest=digest, **size)
            metadata = {**record.metadata, **about}
            if item.text:
                metadata |= own(text=item.text[:TEXT_SHOWN])
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
        return _Row(key, held, metadata, digest)


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
            return {"width": opened.width, "height": opened.height}
    except UserError as error:
        raise UserError(f"{image}: {error}") from error
    except UnidentifiedImageError as error:  # its message names an object in memory
        raise UserError(f"{image}: not a readable image (unknown format); replace or remove it") from error
    except Exception as error:  # Pillow's parsers raise anything on a damaged file (struct.error, KeyError, …)
        raise UserError(f"{image}: not a readable image ({error}); replace or remove it") from error


class _Writer:
    """Collects rows and writes them in parts: known content with the vectors of the store, the rest encoded."""

    def __init__(self, encoder: DocumentEncoder, store: VectorStore, report: IndexReport, state: StoreState) -> None:
        self.encoder, self.store, self.report, self.known = encoder, store, report, state.rows
        self.by_digest = {row.digest: key for key, row in state.rows.items() if row.digest}
        self.waiting: list[_Row] = []
        self.waiting_bytes = 0
        self.part = min(FIRST_PART, PART)
        self.changed: set[str] = set()

    def add(self, row: _Row) -> None:
        """Takes a row; writes a part when it is full."""
        self.waiting.append(row)
        self.waiting_bytes += row.num_bytes()
        if len(self.waiting) >= self.part or self.waiting_bytes >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that wait; more than one commit if the encoder has become slower."""
        part, self.waiting, self.waiting_bytes = self.waiting, [], 0
        self._take_known(part)
        done, since = 0, time.monotonic()
        for stop in range(ENCODED_AT_ONCE, len(part) + ENCODED_AT_ONCE, ENCODED_AT_ONCE):
            self._encode_in_time([row for row in part[stop - ENCODED_AT_ONCE : stop] if row.vector_D is None])
            if stop >= len(part) or time.monotonic() - since >= COMMIT_SECONDS:
                self._commit([row for row in part[done:stop] if row.vector_D is not None])
                done, since = stop, time.monotonic()

    def _commit(self, ready: list[_Row]) -> None:
        """Writes encoded rows: new ones in one commit, changed ones in another."""
        new = [row for row in ready if row.key not in self.known]
        changed = [row for row in ready if row.key in self.known]
        _write(self.store.add, new)
        _write(self.store.upsert, changed)
        self.by_digest |= {row.digest: row.key for row in ready}
        self.report.num_changed += len(changed)
        self.report.num_new += len(new)
        self.changed |= {row.key for row in changed}

    def _encode_in_time(self, rows: list[_Row]) -> None:
        """Encodes rows, and makes the next part as large as the encoder's speed allows in `COMMIT_SECONDS`."""
        since = time.monotonic()
        _encode(rows, self.encoder, self.report)
        seconds = max(time.monotonic() - since, 1e-6)
        if rows:
            self.part = max(1, min(PART, int(len(rows) / seconds * COMMIT_SECONDS)))

    def _take_known(self, part: list[_Row]) -> None:
        keys = {self.by_digest[row.digest] for row in part if row.digest in self.by_digest}
        if not keys:
            return
        found = self.store.fetch(sorted(keys), STATE, vectors=True)
        rows = [] if found.vectors_ND is None else list(found.vectors_ND)
        vectors = {one.get(f"{PREFIX}digest"): vector for one, vector in zip(found.metadata, rows, strict=True)}
        for row in part:
            row.vector_D = vectors.get(row.digest)


def _write(put: Callable[[list[str], np.ndarray, list[dict[str, Any]]], None], rows: list[_Row]) -> None:
    if rows:
        vectors_ND = np.stack([row.vector_D for row in rows])  # type: ignore[misc]
        put([row.key for row in rows], vectors_ND, [row.metadata for row in rows])


def _encode(rows: list[_Row], encoder: DocumentEncoder, report: IndexReport) -> None:
    """Computes the vectors of rows; rows that cannot be read stay without one and are reported."""
    if not rows:
        return
    bad: set[int] = set()

    def on_error(position: int, error: UserError) -> None:
        bad.add(position)
        report.errors.append((rows[position].key, printable(str(error))))

    vectors_ND = encoder.encode_document([row.item for row in rows], on_error=on_error)
    for position, (row, vector) in enumerate(zip(rows, vectors_ND, strict=True)):
        if position not in bad:
            row.vector_D = vector
            report.num_encoded += 1


def thumbnail(image: ImageRef, size: int = THUMBNAIL_PIXELS) -> bytes:
    """A JPEG of an image, at most `size` pixels wide and high."""
    small = image.load()
    small.thumbnail((size, size))
    encoded = io.BytesIO()
    small.save(encoded, format="JPEG", quality=85)
    return encoded.getvalue()
