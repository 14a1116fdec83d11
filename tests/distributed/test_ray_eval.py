"""An evaluation on Ray has the results of the local engine, even if one of two workers is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed.kills import one_killed
from evaluation.toys import write_toy_benchmark
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.evaluation import evaluate as evaluation


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "PART", 8)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_benchmark(tmp_path_factory.mktemp("colours"))


def score(model: str, benchmark: Path, folder: Path, *more: str) -> bytes:
    command = ["eval", model, "--benchmark", benchmark, "-o", folder / "out", "--cache", folder / "cache", *more]
    done = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return (folder / "out/results.json").read_bytes()


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(cluster, model, benchmark, small_parts, tmp_path) -> None:
    local = score(model, benchmark, tmp_path / "local")
    with one_killed("EvalWorker", tmp_path / "ray/cache", "*/*.keys") as killed:
        by_ray = score(model, benchmark, tmp_path / "ray", "--engine", "ray", "--workers", "2")
    assert killed and by_ray == local
    keys = [file.stat().st_size // 32 for file in (tmp_path / "ray/cache").glob("*/*.keys")]
    assert sum(keys) == 60 + 10 + 10 and max(keys) == 8  # no vector is lost or written twice
    assert score(model, benchmark, tmp_path / "ray") == local  # the local engine finds every vector in the cache
    assert len(list((tmp_path / "ray/cache").glob("*/*.keys"))) == len(keys)
