"""Embeds a source into a file of vectors, part by part: a kill loses at most the current part and duplicates nothing.

A job is a folder `OUTPUT.parts` beside the output: `job.json` (what the vectors depend on) and one parquet file per
part, written atomically. A part is a run of consecutive records; it is done if its file has the same keys and versions.
The source is listed once: an input is read when its part is encoded. When all parts are done, they become the output in
one rename, and the folder is removed. An engine computes the missing parts as `Job.run` does, on any machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2vec.errors import UserError, shown
from vlm2vec.files import named_errors, replacing, write_json, write_text
from vlm2vec.jobs.outputs import FORMATS, read_part, write_output
from vlm2vec.jobs.records import Record
from vlm2vec.jobs.sources import Source
from vlm2vec.media.text import printable
from vlm2vec.retrieval.metadata import own
from vlm2vec.retrieval.vector_store import StoreFacts
from vlm2vec.types import EmbeddingInput

JOB_FILE = "job.json"
LAST_FILE = "last-step"
ERRORS_FILE = "errors.jsonl"
PART = 1024
Progress = Callable[[int], None]


class DocumentEncoder(Protocol):
    """Computes the vectors."""

    def encode_document(self, inputs: Sequence[EmbeddingInput], **kwargs: Any) -> np.ndarray:
        """Unit-norm vectors [N, D] in input order."""
        ...


@dataclass(frozen=True)
class EmbedSettings:
    """How vectors are computed and stored; a job cannot be resumed with other settings.

    Attributes:
        instruction: For inputs without their own; None: the model's default for documents.
        truncate_dim: Keep only the first dimensions.
        precision: Precision of the output, see `vlm2vec.quantize`.
        part: Records per part: the most that a kill can lose.
    """

    instruction: str | None = None
    truncate_dim: int | None = None
    precision: str = "float32"
    part: int = PART

    def encode_options(self) -> dict[str, Any]:
        """Arguments for `encode_document`."""
        given = {"instruction": self.instruction, "truncate_dim": self.truncate_dim}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Part:
    """Consecutive records of a source, and the file for their vectors."""

    number: int
    records: list[Record]
    file: Path


@dataclass
class EmbedReport:
    """Result of a job.

    Attributes:
        num_vectors: Vectors in the output.
        num_kept: Records that an earlier run had embedded.
        errors: (key, reason) of inputs without a vector.
    """

    num_vectors: int = 0
    num_kept: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)


class Job:
    """The work on one output.

    Args:
        source: The inputs.
        output: `.parquet`, `.npy` (with `.rows.jsonl` beside it) or `.lance` (a vector store).
        settings: How vectors are computed and stored.
        facts: What the vectors depend on besides the input (`vlm2vec.jobs.stores.facts_of`).
        overwrite: Replace an existing output.

    Raises:
        UserError: if the output exists or is of an unknown kind, or the job was started with another model or other
            settings.
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
        """Parts that no earlier run has finished, in order; finished parts count as progress."""
        records, number = iter(self.source), 0
        while found := list(islice(records, self.settings.part)):
            part = Part(number, found, self.folder / f"part-{number:06d}.parquet")
            if is_done(part):
                self.report.num_kept += len(found)
                progress(len(found))
            else:
                yield part
            number += 1
        for file in self.folder.glob("part-*.parquet"):  # of a source that was longer
            if int(file.stem.removeprefix("part-")) >= number:
                file.unlink()

    def run(self, encoder: DocumentEncoder, progress: Progress = lambda done: None) -> None:
        """Embeds the missing parts, one after another; appends to `errors.jsonl` as errors occur."""
        path = self.output.with_name(ERRORS_FILE)
        path.unlink(missing_ok=True)
        for part in self.missing(progress):
            reasons = embed_part(encoder, part, self.settings, progress)
            if reasons:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(map(_error_line, reasons))

    def finish(self) -> EmbedReport:
        """Makes the output from the parts, all of which are done, and removes them; writes `errors.jsonl` in order.

        Raises:
            UserError: if no input could be read.
        """
        files = sorted(self.folder.glob("part-*.parquet"))
        total = 0
        for file in files:
            table = read_part(file, ["key", "error"])
            total += len(table)
            bad = table.filter(table["error"].is_valid())
            self.report.errors += zip(bad["key"].to_pylist(), bad["error"].to_pylist(), strict=True)
        self._write_errors()
        self.report.num_vectors = total - len(self.report.errors)
        if not self.report.num_vectors:
            reason = f"; the first: {self.report.errors[0][1]}" if self.report.errors else ""
            raise UserError(f"{self.source.path}: none of {total} inputs could be embedded{reason}")
        (self.folder / LAST_FILE).touch()
        with named_errors(self.output):
            write_output(self.output, files, self.facts, self.folder)
        shutil.rmtree(self.folder)
        return self.report

    def kept(self) -> str:
        """What a run that stops now leaves for the next run."""
        parts = len(list(self.folder.glob("part-*.parquet")))
        return f"{self.folder} keeps {parts} finished parts of {self.settings.part} inputs"

    def _begin(self) -> None:
        """Writes the settings of a new job, or refuses to resume a job with other settings."""
        facts = {**self.facts.about, "model": self.facts.model, "instruction": self.facts.instruction}
        columns = {name: value for name, value in asdict(self.source.settings).items() if value is not None}
        cut = {"truncate_dim": self.settings.truncate_dim, "part": self.settings.part}
        mine = {**facts, "source": printable(str(self.source.path.resolve())), **columns, **cut}
        file = self.folder / JOB_FILE
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, mine)
            return
        before = json.loads(file.read_text())
        if names := [name for name in sorted({*before, *mine}) if before.get(name) != mine.get(name)]:
            raise UserError(
                f"{self.folder}: was started with different settings ({', '.join(names)}); "
                "delete the folder to start over"
            )

    def _write_errors(self) -> None:
        """Writes all errors beside the output; removes the file of an earlier run if there are none."""
        path = self.output.with_name(ERRORS_FILE)
        if self.report.errors:
            write_text(path, "".join(map(_error_line, self.report.errors)))
        else:
            path.unlink(missing_ok=True)


def check_output(output: Path, settings: EmbedSettings, overwrite: bool) -> None:
    """Checks that the output can be written, before a model is loaded.

    Raises:
        UserError: for an unknown ending or precision, or an output that exists.
    """
    if output.suffix not in FORMATS:
        raise UserError(f"{output}: expected a name that ends in {', '.join(FORMATS)}")
    if settings.precision not in FORMATS[output.suffix]:
        kept = ", ".join(FORMATS[output.suffix])
        raise UserError(f"precision {shown(settings.precision)}: {output.suffix} supports {kept}")
    if output.suffix == ".lance" and settings.truncate_dim is not None:
        raise UserError("truncate_dim: a .lance store needs whole vectors; choose .parquet or .npy")
    if output.exists() and not overwrite:
        raise UserError(f"{output}: already exists; choose another name, or replace it with --overwrite")
    output.parent.mkdir(parents=True, exist_ok=True)


def was_finished(output: Path) -> bool:
    """Whether a run was killed after its output was complete; its leftover parts are removed."""
    last = _parts_folder(output) / LAST_FILE
    if not (output.exists() and last.is_file() and output.stat().st_mtime_ns >= last.stat().st_mtime_ns):
        return False
    shutil.rmtree(last.parent)
    return True


def _parts_folder(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


def embed_part(
    encoder: DocumentEncoder, part: Part, settings: EmbedSettings, progress: Progress = lambda done: None
) -> list[tuple[str, str]]:
    """Writes the file of a part atomically; an input that cannot be read is a row with its reason.

    Returns:
        (key, reason) of the inputs that cannot be read.
    """
    records = part.records
    reasons = {i: record.error or "no input" for i, record in enumerate(records) if not record.item}
    places = [i for i in range(len(records)) if i not in reasons]

    def on_error(position: int, error: UserError) -> None:
        reasons[places[position]] = printable(" ".join(str(error).split()))

    progress(len(reasons))
    items = [record.item for record in records if record.item]
    vectors_ND = encoder.encode_document(items, on_error=on_error, progress=progress, **settings.encode_options())
    rows_ND = np.zeros((len(records), vectors_ND.shape[1]), np.float32)
    rows_ND[places] = vectors_ND
    table = pa.table(
        {
            "key": pa.array([record.key for record in records]),
            "version": pa.array([record.version for record in records]),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(rows_ND.reshape(-1)), vectors_ND.shape[1]),
            "error": pa.array([reasons.get(i) for i in range(len(records))], pa.string()),
            "metadata": pa.array([json.dumps(_metadata(record), default=str) for record in records]),
        }
    )
    with replacing(part.file) as beside:
        pq.write_table(table, beside)
    return [(records[i].key, reason) for i, reason in sorted(reasons.items())]


def _metadata(record: Record) -> dict[str, Any]:
    text = record.item.text if record.item else None
    return {**(own(text=text) if text else {}), **record.metadata}


def _error_line(error: tuple[str, str]) -> str:
    return json.dumps({"key": error[0], "reason": error[1]}, ensure_ascii=False) + "\n"


def is_done(part: Part) -> bool:
    """Whether the part's file has these records in these versions."""
    if not part.file.is_file():
        return False
    table = read_part(part.file, ["key", "version"])
    found = zip(table["key"].to_pylist(), table["version"].to_pylist(), strict=True)
    return list(found) == [(record.key, record.version) for record in part.records]
