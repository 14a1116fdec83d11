"""Embeds a source into a file of vectors, part by part: a kill loses at most the current part and duplicates nothing.

A job is a folder `OUTPUT.parts` beside the output: `_job.json` (what the vectors depend on) and one parquet file per
part, written atomically. A part is a run of consecutive records; it is done if its file has the same keys and versions.
The source is listed once: an input is read when its part is encoded. When all parts are done, they become the output in
one rename, and the folder is removed. An output without an ending is the folder of parts itself: no vector is written
twice. An engine computes the missing parts as `Job.run` does, on any machine.
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
import pyarrow.parquet as pq

from vlm2vec.errors import UserError, shown
from vlm2vec.files import TEMPORARY, named_errors, write_json, write_text
from vlm2vec.jobs.outputs import FORMATS, PARTS, write_output
from vlm2vec.jobs.parts import NAMES, errors_of, inputs_of, part_name, write_part
from vlm2vec.jobs.records import Record
from vlm2vec.jobs.sources import Source
from vlm2vec.media.text import printable
from vlm2vec.retrieval.vector_store import StoreFacts
from vlm2vec.types import EmbeddingInput

JOB_FILE = "_job.json"  # readers of a folder of parquet ignore names that begin with _
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
    """Consecutive records of a source, the file for their vectors, and what those depend on."""

    number: int
    records: list[Record]
    file: Path
    facts: StoreFacts


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
        output: `.parquet`, `.npy` (with `.rows.jsonl` beside it), `.lance` (a vector store), or a name without an
            ending (a folder of parts).
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
            part = Part(number, found, self.folder / part_name(number), self.facts)
            if is_done(part):
                self.report.num_kept += len(found)
                progress(len(found))
            else:
                yield part
            number += 1
        for file in self.folder.glob(NAMES):  # of a source that was longer
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
        files = sorted(self.folder.glob(NAMES))
        for file in files:
            with pq.ParquetFile(file) as part:
                self.report.num_vectors += part.metadata.num_rows
                self.report.errors += [(key, reason) for _, key, _, reason in errors_of(part.schema_arrow)]
        self._write_errors()
        if not self.report.num_vectors:
            errors = self.report.errors
            reason = f"; the first: {errors[0][1]}" if errors else ""
            raise UserError(f"{self.source.path}: none of {len(errors)} inputs could be embedded{reason}")
        with named_errors(self.output):
            self._make_output(files)
        return self.report

    def _make_output(self, files: list[Path]) -> None:
        """Makes the output from the files of the parts; the folder of a job whose output is a folder takes its name."""
        if self.output.suffix == PARTS:
            for file in self.folder.glob(f".*{TEMPORARY}*"):  # of killed processes
                file.unlink()
            if self.output.exists():
                shutil.rmtree(self.output)
            self.folder.replace(self.output)
            return
        (self.folder / LAST_FILE).touch()
        write_output(self.output, files, self.facts, self.folder)
        shutil.rmtree(self.folder)

    def kept(self) -> str:
        """What a run that stops now leaves for the next run."""
        parts = len(list(self.folder.glob(NAMES)))
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
        endings = ", ".join(ending for ending in FORMATS if ending != PARTS)
        raise UserError(
            f"{output}: expected a name that ends in {endings}, or has no ending (a folder of parquet files)"
        )
    if settings.precision not in FORMATS[output.suffix]:
        kept = ", ".join(FORMATS[output.suffix])
        raise UserError(f"precision {shown(settings.precision)}: {output.suffix or 'a folder'} supports {kept}")
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
    good = [position for position, place in enumerate(places) if place not in reasons]
    write_part(part.file, records, vectors_ND[good], reasons, part.facts)
    return [(records[i].key, reason) for i, reason in sorted(reasons.items())]


def _error_line(error: tuple[str, str]) -> str:
    return json.dumps({"key": error[0], "reason": error[1]}, ensure_ascii=False) + "\n"


def is_done(part: Part) -> bool:
    """Whether the part's file has these records in these versions."""
    return part.file.is_file() and inputs_of(part.file) == [(record.key, record.version) for record in part.records]
