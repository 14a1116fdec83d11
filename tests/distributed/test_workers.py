"""The actors' code in this process, without a cluster: the output of the local engine, and nothing encoded twice.

The tests with a real cluster are slow, because each actor imports torch; `make test-all` runs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from samples import draw
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.data.mmeb.images import TRAIN_COLUMNS
from vlm2vec.distributed import ray_embed, ray_index, ray_mine
from vlm2vec.distributed.cluster import RayPool
from vlm2vec.distributed.ray_eval import EvalWorker, RayEngine
from vlm2vec.distributed.ray_index import IndexWorker, RayWriter
from vlm2vec.distributed.ray_mine import MineWorker
from vlm2vec.errors import UserError
from vlm2vec.retrieval.embedding_cache import EmbeddingCache, InputKeys
from vlm2vec.retrieval.open import open_store
from vlm2vec.training import nearest
from vlm2vec.types import EmbeddingInput


def embed(model: str, inputs: Path, output: Path, *more: str) -> str:
    done = CliRunner().invoke(app, ["embed", model, str(inputs), "-o", str(output), "--part", "3", *more])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_an_actor_writes_the_parts_of_the_local_engine(model, tmp_path, monkeypatch) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for i in range(7):
        draw(inputs / f"{i}.png", ("red", "green", "blue")[i % 3], i)
    (inputs / "bad.png").write_bytes(b"not an image")
    counted: list[int] = []

    def run_here(job: Any, pool: RayPool, progress: Callable[[int], None]) -> None:
        actor = ray_embed.PartEncoder(pool.model, pool.options, job.settings)
        for part in job.missing(progress):
            counted.append(actor.embed(part))

    monkeypatch.setattr(ray_embed, "run_on_ray", run_here)
    local = embed(model, inputs, tmp_path / "local.npy")
    by_actor = embed(model, inputs, tmp_path / "actor.npy", "--engine", "ray")
    assert "7 vectors" in local and "7 vectors" in by_actor and sum(counted) == 8
    assert np.array_equal(np.load(tmp_path / "actor.npy"), np.load(tmp_path / "local.npy"))
    assert [json.loads(line)["key"] for line in (tmp_path / "errors.jsonl").read_text().splitlines()] == ["bad.png"]
    embed(model, inputs, tmp_path / "folder", "--engine", "ray")
    assert len(list((tmp_path / "folder").glob("part-*.parquet"))) == 3 and sum(counted) == 16
    vectors = ds.dataset(tmp_path / "folder").to_table()["vector"].to_pylist()
    assert np.array_equal(np.array(vectors, np.float32), np.load(tmp_path / "local.npy"))


class Handle:
    """An actor's handle whose calls run at once, in this process."""

    def __init__(self, worker: Any) -> None:
        for name in ("describe", "fill", "encode", "mine"):
            setattr(self, name, SimpleNamespace(remote=getattr(worker, name, None)))


class Pool:
    """Ray's `ActorPool` for such handles."""

    def __init__(self, handles: list[Handle]) -> None:
        self.handles, self.results = handles, []

    def has_free(self) -> bool:
        return len(self.results) < len(self.handles)

    def has_next(self) -> bool:
        return bool(self.results)

    def submit(self, call: Callable[[Any, Any], Any], value: Any) -> None:
        assert self.has_free(), "a group is made only when a worker is free"
        self.results.append(call(self.handles[len(self.results)], value))

    def get_next_unordered(self) -> Any:
        return self.results.pop()

    def map(self, call: Callable[[Any, Any], int], values: list[Any]) -> Iterator[int]:
        for number, value in enumerate(values):
            yield call(self.handles[number % len(self.handles)], value)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's calls run in this process."""
    monkeypatch.setattr("ray.get", lambda values: values)
    monkeypatch.setattr("ray.put", lambda value: value)
    monkeypatch.setattr("ray.util.ActorPool", Pool)


def test_actors_fill_the_cache_with_what_it_lacks_once(model, here, tmp_path) -> None:
    items = [EmbeddingInput(text=f"text {number}") for number in range(10)]
    by_key = dict(zip(map(InputKeys(), items), items, strict=True))
    workers = [EvalWorker(model, {}) for _ in range(2)]
    engine = RayEngine([Handle(worker) for worker in workers])
    cache = EmbeddingCache(tmp_path, engine.about)
    some = dict(list(by_key.items())[2:5])
    workers[0].fill(str(tmp_path), some)  # as if an actor had died after this
    done: list[int] = []
    for expected in (7, 0):
        before = engine.num_encoded
        engine.fill(cache, by_key, part_size=4, progress=done.append)
        assert engine.num_encoded - before == expected
        cache.refresh()
    assert sum(done) == 2 * len(items)
    keys = [file.read_bytes() for file in tmp_path.glob("*/*.keys")]
    assert sum(map(len, keys)) == 32 * len(items)  # no vector is lost or written twice
    want = workers[1].engine.embedder.encode(items)
    assert (cache.rows(list(by_key))[:] * want).sum(axis=1) == pytest.approx(1.0, abs=1e-5)


def test_actors_that_would_give_different_vectors_are_refused(here) -> None:
    def worker(**about: str) -> Handle:
        return Handle(SimpleNamespace(describe=lambda: (about, {}), fill=None))

    with pytest.raises(UserError, match="Ray workers differ in device, torch"):
        RayEngine([worker(device="cpu", torch="2.13"), worker(device="cuda", torch="2.12")])


def rows_of(uri: Path) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    return {
        key: (about, vector)
        for rows in open_store(str(uri)).scan(vectors=True)
        for key, about, vector in zip(rows.keys, rows.metadata, rows.vectors_ND, strict=True)
    }


def run(*words: object) -> str:
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_actors_index_a_source_that_is_listed_once_and_the_store_is_that_of_the_local_engine(
    model, here, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(ray_index, "FIRST_PART", 4)
    monkeypatch.setattr(ray_index, "ENCODED_AT_ONCE", 4)
    for i in range(11):
        draw(tmp_path / f"in/{i:02d}.png", ("red", "green", "blue")[i % 3], i)
    (tmp_path / "in/bad.png").write_bytes(b"not an image")
    groups: list[int] = []

    class Counting(IndexWorker):
        def encode(self, group: Any, *how: Any) -> Any:
            groups.append(len(group))
            return super().encode(group, *how)

    @contextmanager
    def writers_here(pool: RayPool) -> Iterator[Any]:
        workers = [Handle(Counting(pool.model, pool.options)) for _ in range(2)]
        yield lambda commits, reader: RayWriter(workers, commits, reader)

    monkeypatch.setattr(ray_index, "ray_writer", writers_here)
    told = ["--keep-images", "--instruction", "Describe the colour."]
    local, by_actors = tmp_path / "local.lance", tmp_path / "actors.lance"
    said = run("index", model, tmp_path / "in", "--store", local, *told)
    by_ray = run("index", model, tmp_path / "in", "--store", by_actors, *told, "--engine", "ray")
    assert groups == [4, 4, 4]
    assert by_ray.splitlines()[:1] == said.splitlines()[:1] and "11 new, 0 changed" in said
    expected, found = rows_of(local), rows_of(by_actors)
    assert expected.keys() == found.keys() and len(found) == 11
    for key, (about, vector) in expected.items():
        assert found[key][0] == about and found[key][1] @ vector == pytest.approx(1.0, abs=1e-5)
    draw(tmp_path / "in/00.png", "green", 5)
    (tmp_path / "in/01.png").unlink()
    again = run("index", model, tmp_path / "in", "--store", by_actors, *told, "--engine", "ray")
    assert "0 new, 1 changed, 9 unchanged, 1 removed; 1 encoded" in again and groups[3:] == [2]  # and bad.png


def test_actors_mine_the_negatives_of_the_local_engine(model, here, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train/Set").mkdir(parents=True)
    columns = {name: [""] * 30 for name in TRAIN_COLUMNS}
    columns |= {"qry": [f"question {i}" for i in range(30)], "pos_text": [f"answer {i % 9}" for i in range(30)]}
    pq.write_table(pa.table(columns), tmp_path / "train/Set/original-0.parquet")

    mined: list[tuple[int, int]] = []

    class Counting(MineWorker):
        def mine(self, targets_MK: Any, root: str, queries: list[bytes], block: Any, rule: Any) -> Any:
            mined.append((len(targets_MK), len(queries)))
            return super().mine(targets_MK, root, queries, block, rule)

    @contextmanager
    def actors_here(pool: RayPool, kind: type) -> Iterator[list[Handle]]:
        assert kind is MineWorker
        yield [Handle(Counting(pool.model, pool.options)) for _ in range(2)]

    monkeypatch.setattr(ray_mine, "actors", actors_here)
    monkeypatch.setattr(nearest, "BLOCK", 8)
    run("mine", model, tmp_path / "train", "-o", tmp_path / "by-ray", "--num", "2", "--engine", "ray")
    assert mined == [(9, 8), (9, 8), (9, 8), (9, 6)]  # every block of queries once, with all targets
    keys = sum(file.stat().st_size // 32 for file in (tmp_path / "cache").glob("embeddings/*/*.keys"))
    run("mine", model, tmp_path / "train", "-o", tmp_path / "local", "--num", "2")
    assert keys == 39 == sum(file.stat().st_size // 32 for file in (tmp_path / "cache").glob("embeddings/*/*.keys"))
    sets = [pq.read_table(tmp_path / name / "Set") for name in ("by-ray", "local")]
    assert sets[0] == sets[1] and len(sets[0]) == 30
