"""Ctrl-C, full disks and slow encoders: a one-line message says what is kept, and the next run resumes."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from jobs.test_search_cli import SMALL, typed
from jobs.toys import ColourEncoder
from samples import draw

from vlm2vec.cli import run
from vlm2vec.cli.failures import explain
from vlm2vec.files import replacing
from vlm2vec.jobs import index_writer
from vlm2vec.jobs.embed import EmbedSettings, Job
from vlm2vec.jobs.indexing import index_source
from vlm2vec.jobs.sources import open_source
from vlm2vec.models.embedder import Embedder
from vlm2vec.retrieval.lance_store import LanceStore
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import StoreFacts

FACTS = StoreFacts("toy", "colours", 512)
SMALL_DISK = 1 << 18  # bytes of a file


class Wide(ColourEncoder):
    """Distinct vectors of 512 values."""

    def encode_document(self, inputs, **kwargs):  # type: ignore[no-untyped-def]
        self.num_encoded += len(inputs)
        return np.random.default_rng(self.num_encoded).standard_normal((len(inputs), 512), np.float32)


@contextmanager
def small_disk() -> Iterator[None]:
    """In the block, writing more than `SMALL_DISK` bytes to a file fails, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_DISK, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def texts(folder: Path, number: int) -> Path:
    path = folder / "texts.txt"
    path.write_text("".join(f"red {i}\n" for i in range(number)))
    return path


@pytest.mark.parametrize("ending", [".parquet", ".npy", ".lance"])
def test_an_output_that_does_not_fit_on_the_disk_is_one_line_and_the_next_run_keeps_every_part(
    tmp_path: Path, ending: str
) -> None:
    source, output = texts(tmp_path, 300), tmp_path / f"out{ending}"
    job = Job(open_source(source), output, EmbedSettings(part=100), FACTS)
    job.run(Wide())
    with small_disk(), pytest.raises(OSError, match="too large") as error:
        job.finish()
    line, code = explain(error.value)
    assert (
        code == 2
        and f"out{ending}" in line
        and line.endswith("File too large; the limit on file sizes (ulimit -f) is too low")
    )
    assert not output.exists()
    again, encoder = Job(open_source(source), output, EmbedSettings(part=100), FACTS), Wide()
    again.run(encoder)
    assert encoder.num_encoded == 0 and again.finish().num_vectors == 300


def test_an_index_on_a_full_disk_is_one_line_and_keeps_the_commits_before(tmp_path: Path) -> None:
    source, uri = texts(tmp_path, 400), f"{tmp_path}/s.lance"
    store = open_store(uri, FACTS)
    with small_disk(), pytest.raises(OSError, match="too large") as error:
        index_source(Wide(), open_source(source), store)
    assert explain(error.value)[0].startswith(f"{uri}: File too large")
    kept = open_store(uri).count()
    assert kept == index_writer.FIRST_PART
    report = index_source(Wide(), open_source(source), open_store(uri, FACTS))
    assert (report.num_same, report.num_new, open_store(uri).count()) == (kept, 400 - kept, 400)


def test_an_error_of_the_disk_that_names_no_file_gets_the_name_of_the_target(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error, replacing(tmp_path / "v.parquet"):
        raise OSError(28, "Error writing bytes to file. Detail: [errno 28]")
    assert explain(error.value)[0].startswith(f"{tmp_path}/v.parquet: No space left on device; free some space")


def test_a_slow_encoder_commits_after_30_seconds_and_a_fast_one_4096_rows_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, sizes, commits, seconds_a_row = [0.0], [], [], 10.0
    add = LanceStore.add
    monkeypatch.setattr(
        LanceStore, "add", lambda self, keys, *rest: commits.append(len(keys)) or add(self, keys, *rest)
    )

    class Slow(Wide):
        def encode_document(self, inputs, **kwargs):  # type: ignore[no-untyped-def]
            clock[0] += seconds_a_row * len(inputs)
            sizes.append(len(inputs))
            return super().encode_document(inputs, **kwargs)

    monkeypatch.setattr(index_writer.time, "monotonic", lambda: clock[0])
    index_source(Slow(), open_source(texts(tmp_path, 40)), open_store(f"{tmp_path}/slow.lance", FACTS))
    assert sizes == commits == [16, *[3] * 8]
    sizes.clear(), commits.clear()
    seconds_a_row = 0.001
    index_source(Slow(), open_source(texts(tmp_path, 1500)), open_store(f"{tmp_path}/fast.lance", FACTS))
    assert sizes == [16, 512, 512, 460] and commits == [16, 1484]


def test_an_encoder_that_becomes_slow_inside_a_part_commits_after_30_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, commits, add = [0.0], [], LanceStore.add

    class Slowing(Wide):
        def encode_document(self, inputs, **kwargs):  # type: ignore[no-untyped-def]
            clock[0] += (0.001 if len(commits) == 0 else 0.1) * len(inputs)
            return super().encode_document(inputs, **kwargs)

    monkeypatch.setattr(index_writer.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        LanceStore, "add", lambda self, keys, *rest: commits.append(len(keys)) or add(self, keys, *rest)
    )
    index_source(Slowing(), open_source(texts(tmp_path, 1500)), open_store(f"{tmp_path}/s.lance", FACTS))
    assert commits[:2] == [16, 512] and max(commits[2:]) <= 300 and sum(commits) == 1500


@pytest.mark.parametrize("command", ["index", "embed"])
def test_ctrl_c_says_what_is_kept_and_the_command_that_continues_which_then_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for i in range(20):
        draw(tmp_path / f"my photos/{i:02d}.png", "red", i)
    target = ["--store", f"{tmp_path}/s.lance"] if command == "index" else ["-o", f"{tmp_path}/v.npy", "--part", "16"]
    words = [command, "compact", f"{tmp_path}/my photos", *target, *SMALL]
    real, calls = Embedder.encode_document, []

    def pressed(self, inputs, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(len(inputs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, inputs, **kwargs)

    monkeypatch.setattr(Embedder, "encode_document", pressed)
    assert run(words) == 130
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    kept = "s.lance keeps its 16 rows" if command == "index" else "v.npy.parts keeps 1 finished parts of 16 inputs"
    assert f"interrupted; {tmp_path}/{kept}. To continue: vlm2vec {command} compact '{tmp_path}/my photos'" in line
    monkeypatch.setattr(Embedder, "encode_document", real)
    said = typed(*words)
    assert ("16 unchanged" if command == "index" else "16 inputs were embedded by an earlier run") in said
