"""The actors' code in this process, without a cluster: the output of the local engine, and nothing encoded twice.

The tests with a real cluster are slow, because each actor imports torch; `make test-all` runs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from samples import draw
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.distributed import ray_embed
from vlm2vec.distributed.cluster import RayPool
from vlm2vec.distributed.ray_eval import EvalWorker, RayEngine
from vlm2vec.errors import UserError
from vlm2vec.retrieval.embedding_cache import EmbeddingCache, InputKeys
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


class Handle:
    """An actor's handle whose calls run at once, in this process."""

    def __init__(self, worker: Any) -> None:
        for name in ("describe", "fill"):
            setattr(self, name, SimpleNamespace(remote=getattr(worker, name)))


class Pool:
    """Ray's `ActorPool` for such handles."""

    def __init__(self, handles: list[Handle]) -> None:
        self.handles = handles

    def map(self, call: Callable[[Any, Any], int], values: list[Any]) -> Iterator[int]:
        for number, value in enumerate(values):
            yield call(self.handles[number % len(self.handles)], value)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's calls run in this process."""
    monkeypatch.setattr("ray.get", lambda values: values)
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
