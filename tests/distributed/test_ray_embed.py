"""The Ray engine writes the output of the local engine, even if one of two workers is killed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
from distributed.kills import one_killed
from samples import draw
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.jobs.embed import Job
from vlm2vec.retrieval.open import open_store


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for i in range(24):
        draw(folder / f"{i:02d}.png", ("red", "green", "blue")[i % 3], i)
    (folder / "bad.png").write_bytes(b"not an image")
    return folder


def rows_of(output: Path) -> list[str]:
    return [json.loads(line)["key"] for line in output.with_suffix(".rows.jsonl").read_text().splitlines()]


def embed(model: str, inputs: Path, output: Path, *more: str) -> str:
    done = CliRunner().invoke(app, ["embed", model, str(inputs), "-o", str(output), "--part", "3", *more])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.slow
def test_a_killed_worker_changes_nothing_and_no_part_is_listed_before_a_worker_is_free(
    cluster, model, inputs, tmp_path, monkeypatch
) -> None:
    local = embed(model, inputs, tmp_path / "local.npy")
    parts = tmp_path / "ray.npy.parts"
    waiting: list[int] = []
    missing = Job.missing

    def counted(job, *rest):  # type: ignore[no-untyped-def]
        for number, part in enumerate(missing(job, *rest)):
            waiting.append(number - len(list(parts.glob("part-*.parquet"))))
            yield part

    monkeypatch.setattr(Job, "missing", counted)
    with one_killed("PartEncoder", parts, "part-*.parquet") as killed:
        by_ray = embed(model, inputs, tmp_path / "ray.npy", "--engine", "ray", "--workers", "2")
    assert len(waiting) == 9 and max(waiting) <= 2
    assert killed and "24 vectors" in by_ray and "24 vectors" in local
    errors = [json.loads(line)["key"] for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert errors == ["bad.png"]
    assert rows_of(tmp_path / "ray.npy") == rows_of(tmp_path / "local.npy")
    assert np.array_equal(np.load(tmp_path / "ray.npy"), np.load(tmp_path / "local.npy"))


@pytest.mark.slow
def test_workers_write_the_folder_of_parts_themselves_and_a_store_takes_every_row_once(
    cluster, model, inputs, tmp_path
) -> None:
    output = tmp_path / "vectors"
    with one_killed("PartEncoder", tmp_path / "vectors.parts", "part-*.parquet") as killed:
        by_ray = embed(model, inputs, output, "--engine", "ray", "--workers", "2")
    assert killed and "24 vectors" in by_ray and len(list(output.glob("part-*.parquet"))) == 9
    keys = ds.dataset(output).to_table()["key"].to_pylist()
    assert sorted(keys) == [f"{i:02d}.png" for i in range(24)]
    done = CliRunner().invoke(app, ["load", str(output), "--store", str(tmp_path / "photos.lance")])
    assert done.exit_code == 0 and "24 new" in done.output
    (rows,) = open_store(str(tmp_path / "photos.lance")).scan([])
    assert sorted(rows.keys) == sorted(keys)
