"""From a source to a file of vectors, part by part: a kill at any moment loses the part in work and doubles nothing.

A job is a folder `OUTPUT.parts` beside the output: `job.json` (what the vectors depend on) and a parquet file a part,
written beside and renamed. A part is consecutive records of the source; it is done where its file holds these keys in
these versions. When all are done, they become the output in one rename, and the folder is removed. What an engine does
is `Job.run` of the parts that are missing, wherever it runs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec.errors import UserError
from vlm2vec.jobs.outputs import FORMATS, read_part, write_output
from vlm2vec.jobs.records import Record
from vlm2vec.jobs.sources import Source
from vlm2vec.retrieval.vector_store import StoreFacts
from vlm2vec.types import EmbeddingInput

JOB_FILE = "job.json"
LAST_FILE = "last-step"
ERRORS_FILE = "errors.jsonl"
PART = 1024
Progress = Callable[[int], None]


class DocumentEncoder(Protocol):
    """What makes the vectors."""

    def encode_document(self, inputs: Sequence[EmbeddingInput], **kwargs: Any) -> np.ndarray:
        """Unit-norm vectors [N, D] in input order."""
        ...


@dataclass(frozen=True)
class EmbedSettings:
    """How vectors are made and kept; another setting is another job.

    Attributes:
        instruction: For inputs that have none of their own; None: the model's own for documents.
        truncate_dim: Keep the first dimensions only.
        precision: Of the output, see `vlm2vec.quantize`.
        part: Records a part: what a kill can lose.
    """

    instruction: str | None = None
    truncate_dim: int | None = None
    precision: str = "float32"
    part: int = PART

    def encode_options(self) -> dict[str, Any]:
        """What `encode_document` is to be called with."""
        given = {"instruction": self.instruction, "truncate_dim": self.truncate_dim}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Part:
    """Consecutive records of a source, and the file that their vectors belong in."""

    number: int
    records: list[Record]
    file: Path


@dataclass
class EmbedReport:
    """What a job made.

    Attributes:
        num_vectors: In the output.
        num_kept: Records whose vectors an earlier run had made.
        errors: (key, reason) of inputs that have no vector.
    """

    num_vectors: int = 0
    num_kept: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)


class Job:
    """One output in the making.

    Args:
        source: The inputs.
        output: `.parquet`, `.npy` (with `.rows.jsonl` beside it) or `.lance` (a store that can be searched).
        settings: See there.
        facts: What the vectors depend on besides the input (`vlm2vec.jobs.stores.facts_of`).
        overwrite: Replace an output that is there.

    Raises:
        UserError: if the output is there, of another kind, or was begun with another model or other settings.
    """

    def __init__(
        self, source: Source, output: Path, settings: EmbedSettings, facts: StoreFacts, overwrite: bool = False
    ) -> None:
        check_output(output, settings, overwrite)
        self.source, self.output, self.settings = source, output, settings
        self.folder = _parts_folder(output)
        self.facts = replace(facts, dim=settings.truncate_dim or facts.dim, precision=settings.precision)
        self.report = EmbedReport()
        self._begin()

    def missing(self, progress: Progress = lambda done: None) -> Iterator[Part]:
        """Parts that no earlier run has finished, in order; those that it has count as progress."""
        records, number = iter(self.source), 0
        while found := list(islice(records, self.settings.part)):
            part = Part(number, found, self.folder / f"part-{number:06d}.parquet")
            if is_done(part):
                self.report.num_kept += len(found)
                progress(len(found))
            else:
                yield part
            number += 1
        for file in self.folder.glob("part-*"):  # of a source that was longer, and what a killed run left half-written
            if file.suffix != ".parquet" or int(file.stem.removeprefix("part-")) >= number:
                file.unlink()

    def run(self, encoder: DocumentEncoder, progress: Progress = lambda done: None) -> None:
        """Embeds every part that is missing, one after another."""
        for part in self.missing(progress):
            embed_part(encoder, part, self.settings, progress)
            if any(error for error in read_part(part.file, ["error"])["error"].to_pylist()):
                self._write_errors()

    def finish(self) -> EmbedReport:
        """Makes the output of the parts, all of which are done, and removes them.

        Raises:
            UserError: if not a single input could be read.
        """
        files = sorted(self.folder.glob("part-*.parquet"))
        self.report.errors = self._write_errors()
        total = sum(pq.ParquetFile(file).metadata.num_rows for file in files)
        self.report.num_vectors = total - len(self.report.errors)
        if not self.report.num_vectors:
            reason = f"; the first: {self.report.errors[0][1]}" if self.report.errors else ""
            raise UserError(f"{self.source.path}: none of {total} inputs could be embedded{reason}")
        (self.folder / LAST_FILE).touch()
        write_output(self.output, files, self.facts, self.folder)
        shutil.rmtree(self.folder)
        return self.report

    def _begin(self) -> None:
        """Says what job this is, or refuses to go on with another one's parts."""
        facts = {**self.facts.about, "model": self.facts.model, "instruction": self.facts.instruction}
        columns = {name: value for name, value in asdict(self.source.settings).items() if value is not None}
        cut = {"truncate_dim": self.settings.truncate_dim, "part": self.settings.part}
        mine = {**facts, "source": str(self.source.path.resolve()), **columns, **cut}
        file = self.folder / JOB_FILE
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(mine, indent=2))
            return
        before = json.loads(file.read_text())
        if names := [name for name in sorted({*before, *mine}) if before.get(name) != mine.get(name)]:
            raise UserError(
                f"{self.folder}: was begun with another {', '.join(names)}; remove this folder to begin anew"
            )

    def _write_errors(self) -> list[tuple[str, str]]:
        """Writes `errors.jsonl` beside the output from the parts that are done; removes an earlier run's where none."""
        errors = []
        for file in sorted(self.folder.glob("part-*.parquet")):
            table = read_part(file, ["key", "error"])
            pairs = zip(table["key"].to_pylist(), table["error"].to_pylist(), strict=True)
            errors += [(key, reason) for key, reason in pairs if reason is not None]
        path = self.output.with_name(ERRORS_FILE)
        if errors:
            lines = [json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n" for key, reason in errors]
            write_whole(path, "".join(lines))
        else:
            path.unlink(missing_ok=True)
        return errors


def check_output(output: Path, settings: EmbedSettings, overwrite: bool) -> None:
    """Refuses an output that cannot be written, before a model is loaded.

    Raises:
        UserError: for an unknown ending or precision, a folder that is absent, or an output that is there.
    """
    if output.suffix not in FORMATS:
        raise UserError(f"{output}: expected a name that ends in {', '.join(FORMATS)}")
    if settings.precision not in FORMATS[output.suffix]:
        kept = ", ".join(FORMATS[output.suffix])
        raise UserError(f"precision {settings.precision!r}: {output.suffix} keeps {kept}")
    if output.suffix == ".lance" and settings.truncate_dim is not None:
        raise UserError("truncate_dim: a .lance store keeps whole vectors; choose .parquet or .npy")
    if output.exists() and not overwrite:
        raise UserError(f"{output}: is there already; choose another name, or replace it with --overwrite")
    output.parent.mkdir(parents=True, exist_ok=True)


def was_finished(output: Path) -> bool:
    """Whether a run was killed after its output was there; what it left beside it is removed."""
    last = _parts_folder(output) / LAST_FILE
    if not (output.exists() and last.is_file() and output.stat().st_mtime_ns >= last.stat().st_mtime_ns):
        return False
    shutil.rmtree(last.parent)
    return True


def _parts_folder(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


def embed_part(
    encoder: DocumentEncoder, part: Part, settings: EmbedSettings, progress: Progress = lambda done: None
) -> None:
    """Writes the file of a part, whole or not at all; an input that cannot be read is a row with its reason."""
    reasons: dict[int, str] = {
        i: record.error or "no input" for i, record in enumerate(part.records) if not record.item
    }
    places = [i for i in range(len(part.records)) if i not in reasons]

    def on_error(position: int, error: UserError) -> None:
        reasons[places[position]] = " ".join(str(error).split())

    progress(len(reasons))
    items = [record.item for record in part.records if record.item]
    vectors_ND = encoder.encode_document(items, on_error=on_error, progress=progress, **settings.encode_options())
    rows_ND = np.zeros((len(part.records), vectors_ND.shape[1]), np.float32)
    rows_ND[places] = vectors_ND
    texts = [record.item.text if record.item else None for record in part.records]
    table = pa.table(
        {
            "key": pa.array([record.key for record in part.records]),
            "version": pa.array([record.version for record in part.records]),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(rows_ND.reshape(-1)), vectors_ND.shape[1]),
            "error": pa.array([reasons.get(i) for i in range(len(part.records))], pa.string()),
            "metadata": pa.array(
                [
                    json.dumps({**({"text": text} if text else {}), **record.metadata}, default=str)
                    for record, text in zip(part.records, texts, strict=True)
                ]
            ),
        }
    )
    beside = part.file.with_name(f"{part.file.stem}.{os.getpid()}.tmp")
    pq.write_table(table, beside)
    beside.replace(part.file)


def is_done(part: Part) -> bool:
    """Whether the part's file holds these records in these versions."""
    if not part.file.is_file():
        return False
    table = read_part(part.file, ["key", "version"])
    found = zip(table["key"].to_pylist(), table["version"].to_pylist(), strict=True)
    return list(found) == [(record.key, record.version) for record in part.records]


def write_whole(path: Path, content: str) -> None:
    """Writes a text file whole or not at all."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(content, encoding="utf-8")
    beside.replace(path)
