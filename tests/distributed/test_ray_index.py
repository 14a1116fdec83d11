"""The Ray engine writes the store of the local engine, even if one of two workers is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed.kills import one_killed
from samples import draw
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.jobs.index_writer import Commits
from vlm2vec.retrieval.open import open_store


def index(model: str, inputs: Path, store: Path, *more: str) -> str:
    done = CliRunner().invoke(app, ["index", model, str(inputs), "--store", str(store), *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def vectors_of(store: Path) -> tuple[list[str], np.ndarray]:
    (rows,) = open_store(str(store)).scan((), vectors=True)
    assert rows.vectors_ND is not None
    return sorted(rows.keys), rows.vectors_ND[np.argsort(rows.keys)]


@pytest.mark.slow
def test_a_killed_worker_loses_and_doubles_no_row(cluster, model, tmp_path, monkeypatch) -> None:
    for i in range(60):
        draw(tmp_path / f"in/{i:02d}.png", ("red", "green", "blue")[i % 3], i)
    extend, groups = Commits.extend, []

    def told(self: Commits, rows: Any, num_done: int) -> None:
        groups.append(num_done)
        (tmp_path / f"group-{len(groups)}").touch()
        extend(self, rows, num_done)

    monkeypatch.setattr(Commits, "extend", told)
    with one_killed("IndexWorker", tmp_path, "group-*") as killed:
        said = index(model, tmp_path / "in", tmp_path / "ray.lance", "--engine", "ray", "--workers", "2")
    assert killed and "60 new" in said and sum(groups) == 60
    index(model, tmp_path / "in", tmp_path / "local.lance")
    keys, vectors_ND = vectors_of(tmp_path / "ray.lance")
    expected, local_ND = vectors_of(tmp_path / "local.lance")
    assert keys == expected and len(set(keys)) == 60
    assert np.allclose(vectors_ND, local_ND, atol=1e-5)
