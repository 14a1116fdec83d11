"""From a folder to a store: only what is new or changed is encoded, what is gone is removed.

A row of the store is a record of the source (`vlm2vec.jobs.sources`). Its key is the source's path and the record's
key. `version` (size and time of the file) says whether it may have changed; `digest` (of its content) whether it did:
a file that was moved, copied or touched takes the vector that is there. Parts are written one by one, so a process that
is killed loses one part at most, and the next run goes on from there.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlm2vec.errors import UserError
from vlm2vec.jobs.records import Record
from vlm2vec.jobs.sources import Source
from vlm2vec.media.images import ImageRef
from vlm2vec.retrieval.vector_store import IMAGE, IndexFacts, VectorStore
from vlm2vec.types import EmbeddingInput, Media, by_content, content_key

PART = 512
TEXT_SHOWN = 1000
THUMBNAIL = 512
STATE = ("source", "version", "digest")  # fields that are ours and not the user's
HASHED_KINDS = ("picture", "text", "row")  # pages and frames are rendered, which costs as much as encoding them


class DocumentEncoder(Protocol):
    """What makes the vectors."""

    def encode_document(self, inputs: Sequence[EmbeddingInput], **kwargs: Any) -> np.ndarray:
        """Unit-norm vectors [N, D] in input order; `on_error(position, error)` for each that cannot be read."""
        ...


@dataclass
class IndexReport:
    """What a run did.

    Attributes:
        num_new, num_changed: Rows written; `num_encoded` of them were encoded, the others' content was known.
        num_same: Rows that were left alone.
        num_removed: Rows whose file is gone or can no longer be read.
        errors: (key, reason) of inputs that could not be read.
        index: How the store is searched now.
    """

    num_new: int = 0
    num_changed: int = 0
    num_encoded: int = 0
    num_same: int = 0
    num_removed: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)
    index: IndexFacts = field(default_factory=lambda: IndexFacts("exact", "not looked at"))


@dataclass
class _Row:
    """A record on its way into the store."""

    key: str
    item: EmbeddingInput
    metadata: dict[str, Any]
    digest: str | None
    vector_D: np.ndarray | None = None


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
        encoder: Of the store's model.
        source: What is to be found in the store; rows of other sources are left alone.
        store: Made with `create`, so that the model is known to be its own.
        keep_images: Keep a small copy of each image in the store, so that results can be shown without the files.
        index: Kind of the index; None: chosen by the number of rows.
        progress: Called with the number of records done since the last call.
    """
    root = str(source.path.resolve())
    have = _state(store)
    report = IndexReport()
    gone = {key for key, one in have.items() if one.get("source") == root}
    writer = _Writer(encoder, store, report, have)
    seen: set[str] = set()
    for record in source:
        key = f"{root}{'/' if source.path.is_dir() else '#'}{record.key}"
        known = have.get(key)
        if key in seen:
            report.errors.append((key, "this key appears twice in the source; only its first input is kept"))
        elif known and record.error is None and known.get("version") == record.version:
            seen.add(key)
            gone.discard(key)
            report.num_same += 1
        elif row := _row_of(key, record, root, keep_images, report):
            seen.add(key)
            gone -= writer.add(row)
        progress(1)
    gone -= writer.flush()
    store.delete(sorted(gone))
    report.num_removed = len(gone)
    report.index = store.build_index(index)
    return report


def write_errors(report: IndexReport, path: Path) -> None:
    """Writes the inputs that could not be read as JSON lines; removes the file of an earlier run where all could."""
    if not report.errors:
        path.unlink(missing_ok=True)
        return
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in report.errors))
    beside.replace(path)


def _state(store: VectorStore) -> dict[str, dict[str, Any]]:
    """Source, version and digest of every row, by key."""
    return {key: one for rows in store.scan(STATE) for key, one in zip(rows.keys, rows.metadata, strict=True)}


def _row_of(key: str, record: Record, root: str, keep_images: bool, report: IndexReport) -> _Row | None:
    """A record with what is kept of it; None and a line in the report where it cannot be read."""
    if record.item is None:
        report.errors.append((key, record.error or "no input"))
        return None
    item = record.item
    metadata = {**record.metadata, "source": root, "version": record.version, "modality": _modality(item)}
    if item.text:
        metadata.setdefault("text", item.text[:TEXT_SHOWN])
    digest = None
    try:
        if metadata.get("kind") in HASHED_KINDS:
            digest = _look(item, metadata)
        if item.images:
            first = item.images[0]
            metadata |= {"path": first.path or metadata.get("path"), "member": first.member}
            if keep_images or first.data is not None:
                metadata[IMAGE] = thumbnail(first)
        if metadata.get("path"):
            metadata["path"] = str(Path(metadata["path"]).resolve())
    except UserError as error:
        report.errors.append((key, str(error)))
        return None
    return _Row(key, item, metadata | {"digest": digest}, digest)


def _modality(item: EmbeddingInput) -> str:
    if item.video is not None:
        return "video"
    return ("both" if item.text else "picture") if item.images else "text"


def _look(item: EmbeddingInput, metadata: dict[str, Any]) -> str:
    """Reads an input's content once: its digest, and width and height of its first image."""

    def digest(media: Media) -> bytes:
        if not item.images or media is not item.images[0]:
            return by_content(media)
        raw = item.images[0].read()
        try:
            with Image.open(io.BytesIO(raw)) as opened:
                metadata.update(width=opened.width, height=opened.height)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{media}: not a readable image ({error}); replace or remove it") from error
        return hashlib.sha256(raw).digest()

    return content_key(item, digest).hex()[:32]


class _Writer:
    """Gathers rows into parts and writes them: with the vectors of known content, the others encoded."""

    def __init__(
        self, encoder: DocumentEncoder, store: VectorStore, report: IndexReport, have: dict[str, dict[str, Any]]
    ) -> None:
        self.encoder, self.store, self.report, self.have = encoder, store, report, have
        self.by_digest = {one["digest"]: key for key, one in have.items() if one.get("digest")}
        self.waiting: list[_Row] = []

    def add(self, row: _Row) -> set[str]:
        """Takes a row; returns the keys that were written."""
        self.waiting.append(row)
        return self.flush() if len(self.waiting) >= PART else set()

    def flush(self) -> set[str]:
        """Writes what waits, in one commit."""
        part, self.waiting = self.waiting, []
        self._take_known(part)
        _encode([row for row in part if row.vector_D is None], self.encoder, self.report)
        ready = [row for row in part if row.vector_D is not None]
        if ready:
            vectors_ND = np.stack([row.vector_D for row in ready])  # type: ignore[misc]
            self.store.upsert([row.key for row in ready], vectors_ND, [row.metadata for row in ready])
        self.by_digest |= {row.digest: row.key for row in ready if row.digest}
        written = {row.key for row in ready}
        self.report.num_changed += len(written & self.have.keys())
        self.report.num_new += len(written - self.have.keys())
        return written

    def _take_known(self, part: list[_Row]) -> None:
        keys = {self.by_digest[row.digest] for row in part if row.digest in self.by_digest}
        found = self.store.fetch(sorted(keys), STATE, vectors=True)
        rows = [] if found.vectors_ND is None else list(found.vectors_ND)
        vectors = {one.get("digest"): vector for one, vector in zip(found.metadata, rows, strict=True)}
        for row in part:
            row.vector_D = vectors.get(row.digest) if row.digest else None


def _encode(rows: list[_Row], encoder: DocumentEncoder, report: IndexReport) -> None:
    """Gives rows their vectors; those that cannot be read stay without, and are reported."""
    if not rows:
        return
    bad: set[int] = set()

    def on_error(position: int, error: UserError) -> None:
        bad.add(position)
        report.errors.append((rows[position].key, str(error)))

    vectors_ND = encoder.encode_document([row.item for row in rows], on_error=on_error)
    for position, (row, vector) in enumerate(zip(rows, vectors_ND, strict=True)):
        if position not in bad:
            row.vector_D = vector
            report.num_encoded += 1


def thumbnail(image: ImageRef, size: int = THUMBNAIL) -> bytes:
    """A small JPEG of an image."""
    small = image.load()
    small.thumbnail((size, size))
    encoded = io.BytesIO()
    small.save(encoded, format="JPEG", quality=85)
    return encoded.getvalue()
