"""Mining on Ray has the negatives of the local engine, even if one of two workers is killed while it compares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed.kills import one_killed
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.data.mmeb.images import TRAIN_COLUMNS
from vlm2vec.distributed import ray_mine
from vlm2vec.training import nearest


def mine(model: str, folder: Path, output: Path, *more: str) -> pa.Table:
    command = ["mine", model, str(folder / "train"), "-o", str(output), "--num", "2", *more]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return pq.read_table(output / "Set")


@pytest.mark.slow
def test_a_worker_killed_while_it_compares_changes_no_negative(cluster, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train/Set").mkdir(parents=True)
    columns = {name: [""] * 60 for name in TRAIN_COLUMNS}
    columns |= {"qry": [f"question {i}" for i in range(60)], "pos_text": [f"answer {i}" for i in range(60)]}
    pq.write_table(pa.table(columns), tmp_path / "train/Set/original-0.parquet")
    local = mine(model, tmp_path, tmp_path / "local")
    monkeypatch.setattr(nearest, "BLOCK", 8)

    def told(*arguments: Any) -> Iterator[nearest.QueryBlock]:
        for number, block in enumerate(nearest.query_blocks(*arguments)):
            (tmp_path / f"block-{number}").touch()
            yield block

    monkeypatch.setattr(ray_mine, "query_blocks", told)
    with one_killed("MineWorker", tmp_path, "block-2") as killed:
        by_ray = mine(model, tmp_path, tmp_path / "ray", "--engine", "ray", "--workers", "2")
    assert killed and by_ray == local and len(list(tmp_path.glob("block-*"))) == 8
