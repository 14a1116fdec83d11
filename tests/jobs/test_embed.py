"""`vlm2vec embed`: every input appears once with its own vector, despite bad inputs and kills."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from jobs.toys import ColourEncoder
from samples import draw
from typer.testing import CliRunner

from vlm2vec import Embedder
from vlm2vec.cli import app
from vlm2vec.errors import UserError
from vlm2vec.jobs import embed as embed_job
from vlm2vec.jobs.embed import EmbedSettings, Job, check_output
from vlm2vec.jobs.parts import errors_of
from vlm2vec.jobs.sources import Source, open_source
from vlm2vec.jobs.stores import facts_of
from vlm2vec.quantize import quantize
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import StoreFacts

COLORS = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def embedder(tiny_vlm) -> Embedder:
    return Embedder.from_pretrained(tiny_vlm("llava"), device="cpu", dtype=torch.float32)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images, a text, and two files that are no images."""
    folder = tmp_path / "photos"
    for i in range(10):
        draw(folder / f"{i:02d}.png", COLORS[i % 4], i)
    (folder / "note.txt").write_text("a note")
    (folder / "03b.png").write_bytes(b"no picture")
    (folder / "07b.jpg").write_bytes((folder / "00.png").read_bytes()[:100])
    return folder


def embed(embedder: Embedder, source: Path, output: Path, **settings: Any) -> Any:
    chosen = EmbedSettings(**{"part": 4, **settings})
    job = Job(open_source(source), output, chosen, facts_of(embedder, "tiny", dtype=torch.float32))
    job.run(embedder)
    return job.finish()


def expected_of(embedder: Embedder, photos: Path) -> dict[str, np.ndarray]:
    good = {f"{i:02d}.png": photos / f"{i:02d}.png" for i in range(10)} | {"note.txt": "a note"}
    return dict(zip(good, embedder.encode_document(list(good.values())), strict=True))


def test_parquet_has_every_good_input_once_and_errors_name_the_others(embedder, photos, tmp_path) -> None:
    output = tmp_path / "out/vectors.parquet"
    report = embed(embedder, photos, output)
    table = pq.read_table(output)
    expected = expected_of(embedder, photos)
    assert sorted(table["key"].to_pylist()) == sorted(expected) and report.num_vectors == 11
    for key, vector in zip(table["key"].to_pylist(), table["vector"].to_pylist(), strict=True):
        np.testing.assert_allclose(vector, expected[key], atol=2e-6)
    by_key = dict(zip(table["key"].to_pylist(), table.drop(["key", "vector"]).to_pylist(), strict=True))
    assert by_key["note.txt"] == {"v2v_path": str(photos / "note.txt"), "v2v_kind": "text", "v2v_text": "a note"}
    assert by_key["04.png"]["v2v_kind"] == "image" and by_key["04.png"]["v2v_text"] is None
    errors = [json.loads(line) for line in (output.parent / "errors.jsonl").read_text().splitlines()]
    assert {error["key"] for error in errors} == {"03b.png", "07b.jpg"} == {key for key, _ in report.errors}
    assert all("not a readable image" in error["reason"] for error in errors)
    assert sorted(path.name for path in output.parent.iterdir()) == ["errors.jsonl", "vectors.parquet"]


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "ubinary"])
def test_an_array_has_its_rows_beside_it_in_every_precision(embedder, photos, tmp_path, precision) -> None:
    output = tmp_path / "v.npy"
    embed(embedder, photos, output, precision=precision)
    rows = [json.loads(line) for line in (tmp_path / "v.rows.jsonl").read_text().splitlines()]
    expected = expected_of(embedder, photos)
    vectors = np.stack([expected[row["key"]] for row in rows])
    found = np.load(output)
    assert len(rows) == 11 and rows[0]["v2v_path"] == str(photos / "00.png")
    assert found.dtype == quantize(vectors, precision).dtype and found.shape == quantize(vectors, precision).shape
    gap = 1 if precision == "int8" else 0 if precision == "ubinary" else 1e-3
    np.testing.assert_allclose(found.astype(float), quantize(vectors, precision).astype(float), atol=gap)


def test_a_lance_output_is_a_store_of_this_model_that_can_be_searched(embedder, photos, tmp_path) -> None:
    output = tmp_path / "v.lance"
    embed(embedder, photos, output)
    store = open_store(str(output), create=facts_of(embedder, "tiny", dtype=torch.float32))
    assert store.count() == 11 and store.count("kind = 'text'") == 1
    query = embedder.encode_document(["a note"])[0]
    best = store.search(query, 1)[0]
    assert best.key == "note.txt" and best.score == pytest.approx(1, abs=1e-5)
    store.close()


def test_metadata_of_tables_become_columns_of_one_type(embedder, tmp_path) -> None:
    rows = [{"id": i, "text": f"t{i}", "price": price} for i, price in enumerate([1, 2.5, None, 4, 5, 6])]
    rows[5]["note"] = "only here"
    rows[4]["mixed"], rows[5]["mixed"] = 1, "one"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    embed(embedder, tmp_path / "rows.jsonl", tmp_path / "v.parquet", truncate_dim=8)
    table = pq.read_table(tmp_path / "v.parquet")
    assert table["price"].to_pylist() == [1, 2.5, None, 4, 5, 6]
    assert table["note"].to_pylist() == [None] * 5 + ["only here"]
    assert table["mixed"].to_pylist() == [None] * 4 + ["1", "one"]
    assert table["v2v_text"].to_pylist()[0] == "t0" and len(table["vector"][0]) == 8


def content(output: Path) -> object:
    """What an output holds: a file's bytes, a store's rows."""
    if output.is_file():
        return output.read_bytes()
    if not output.suffix:
        return {file.name: file.read_bytes() for file in output.glob("*.parquet")}
    rows = [
        (key, vector.tobytes(), one)
        for part in open_store(str(output)).scan(vectors=True)
        for key, vector, one in zip(part.keys, part.vectors_ND, part.metadata, strict=True)
    ]
    return sorted(rows, key=lambda row: row[0])


@pytest.mark.parametrize("ending", [".parquet", ".npy", ".lance", ""])
def test_killed_at_any_step_the_next_run_ends_with_the_uninterrupted_output(tmp_path, ending) -> None:
    source = tmp_path / "lines.txt"
    source.write_text("".join(f"text {i}\n" for i in range(13)))
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(script), str(source), str(tmp_path / "runs"), ending]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) >= 2 * 6  # job.json, four parts, the output; before and after
    whole = content(tmp_path / f"runs/whole{ending}")
    for kill in kills:
        assert kill["killed"] == signal.SIGKILL and kill["again"] == 0, kill
        assert content(Path(kill["output"])) == whole
        assert {path.name for path in Path(kill["output"]).parent.iterdir()} <= {f"out{ending}", "out.rows.jsonl"}
    assert {kill["encoded"] for kill in kills} >= {13, 9, 5, 1, 0}  # parts that were done are not encoded again


class Counting:
    def __init__(self, embedder: Embedder) -> None:
        self.embedder, self.seen = embedder, 0

    def encode_document(self, inputs: Sequence[Any], **options: Any) -> np.ndarray:
        self.seen += len(inputs)
        return self.embedder.encode_document(inputs, **options)


def test_a_file_that_changed_between_two_runs_is_embedded_again_and_one_that_is_gone_is_left_out(
    embedder, photos, tmp_path
) -> None:
    output, facts = tmp_path / "v.parquet", facts_of(embedder, "tiny", dtype=torch.float32)
    job = Job(open_source(photos), output, EmbedSettings(part=4), facts)
    job.run(embedder)  # and is killed before it finishes
    draw(photos / "09.png", "red", 77)
    (photos / "note.txt").unlink()
    counting = Counting(embedder)
    again = Job(open_source(photos), output, EmbedSettings(part=4), facts)
    again.run(counting)
    report = again.finish()
    assert counting.seen == 4 and report.num_kept == 8  # the part of 09.png
    table = pq.read_table(output)
    assert sorted(table["key"].to_pylist()) == [f"{i:02d}.png" for i in range(10)]
    vector = table["vector"][table["key"].to_pylist().index("09.png")].as_py()
    np.testing.assert_allclose(vector, embedder.encode_document([photos / "09.png"])[0], atol=2e-6)


def test_a_job_begun_with_other_settings_or_an_output_that_is_there_is_refused(embedder, photos, tmp_path) -> None:
    facts = facts_of(embedder, "tiny", dtype=torch.float32)
    Job(open_source(photos), tmp_path / "v.parquet", EmbedSettings(), facts)
    with pytest.raises(UserError, match="started with different settings \\(part, truncate_dim\\)"):
        Job(open_source(photos), tmp_path / "v.parquet", EmbedSettings(truncate_dim=8, part=3), facts)
    (tmp_path / "there.npy").touch()
    for output, settings, words in [
        ("there.npy", {}, "--overwrite"),
        ("v.txt", {}, "ends in .parquet, .npy, .lance"),
        ("v.npy", {"precision": "int4"}, "int4"),
        ("v.lance", {"precision": "int8"}, "float32, float16"),
        ("v.lance", {"truncate_dim": 8}, "whole vectors"),
    ]:
        with pytest.raises(UserError, match=words):
            check_output(tmp_path / output, EmbedSettings(**settings), overwrite=False)


def test_where_nothing_can_be_read_there_is_no_output_and_the_reason_is_said(embedder, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"none of 1 inputs could be embedded; the first: .*not a readable image"):
        embed(embedder, tmp_path / "in", tmp_path / "v.parquet")
    assert not (tmp_path / "v.parquet").exists() and (tmp_path / "errors.jsonl").exists()


def test_the_command_says_what_it_made_and_what_it_could_not(photos, tmp_path, tiny_vlm) -> None:
    (photos / "list.xyz").touch()
    command = ["embed", str(tiny_vlm("llava")), str(photos), "-o", str(tmp_path / "v.parquet"), "--part", "5"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    for words in (
        "11 vectors",
        "2 inputs could not be embedded",
        "errors.jsonl",
        "Skipped 1 file of other types: 1 .xyz",
    ):
        assert words in done.stdout
    assert pq.read_metadata(tmp_path / "v.parquet").num_rows == 11
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, UserError) and "--overwrite" in str(again.exception)
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0


def test_bad_inputs_cost_one_look_at_each_part_and_each_input_is_listed_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "note.txt").write_text("red")
    for i in range(20):
        (photos / f"{i:02d}x.png").write_bytes(b"bad")
    source, reads, listed = open_source(photos), [], []
    monkeypatch.setattr(embed_job, "errors_of", lambda schema: reads.append(schema) or errors_of(schema))
    real = Source.records_of
    monkeypatch.setattr(Source, "records_of", lambda self, file: listed.append(file) or real(self, file))
    job = Job(source, tmp_path / "v.npy", EmbedSettings(part=3), StoreFacts("toy", "colours", 3))
    job.run(ColourEncoder())
    report = job.finish()
    assert (report.num_vectors, len(report.errors)) == (11, 22)
    assert len(listed) == len(set(listed)) == 33
    assert len(reads) == 11, "no part is read again after an error"
    lines = (tmp_path / "errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [key for key, _ in report.errors]
