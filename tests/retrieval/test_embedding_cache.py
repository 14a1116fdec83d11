"""The embedding cache: equality of inputs, robustness to damage and kills, sharing between processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.retrieval import embedding_cache
from vlm2vec.retrieval.cache_folder import clean_cache, list_cache
from vlm2vec.retrieval.embedding_cache import EmbeddingCache, InputKeys, fill, fingerprint
from vlm2vec.types import EmbeddingInput, content_key

ABOUT = {"model": "toy", "weights": "w1", "template": "t1"}


def items(count: int) -> dict[bytes, EmbeddingInput]:
    inputs = [EmbeddingInput(text=f"text {i}") for i in range(count)]
    return dict(zip(map(InputKeys(), inputs), inputs, strict=True))


def numbers(inputs: list[EmbeddingInput]) -> np.ndarray:
    """A vector that tells which input it is of."""
    return np.array([[float((item.text or "0").split()[-1]), 1.0] for item in inputs], dtype=np.float32)


def test_vectors_come_back_in_the_order_asked_for_and_after_reopening(tmp_path: Path) -> None:
    wanted = items(10)
    cache = EmbeddingCache(tmp_path, ABOUT)
    assert fill(cache, wanted, numbers, part_size=3) == 10
    keys = list(wanted)[::-1]
    for again in (cache, EmbeddingCache(tmp_path, ABOUT)):
        rows = again.rows(keys)
        assert rows[:][:, 0].tolist() == list(range(9, -1, -1))
        assert rows[[2, 0]][:, 0].tolist() == [7, 9]
        assert rows[4].tolist() == [5.0, 1.0]
        assert rows.view([8, 1])[:][:, 0].tolist() == [1, 8]
        assert len(again) == 10


def test_a_second_run_encodes_nothing_and_a_longer_one_only_what_is_new(tmp_path: Path) -> None:
    fill(EmbeddingCache(tmp_path, ABOUT), items(10), numbers, part_size=3)
    assert fill(EmbeddingCache(tmp_path, ABOUT), items(10), numbers, part_size=3) == 0
    assert fill(EmbeddingCache(tmp_path, ABOUT), items(14), numbers, part_size=3) == 4


@pytest.mark.parametrize("part", ["weights", "template"])
def test_vectors_of_another_fingerprint_are_not_used_and_that_is_said(tmp_path: Path, part: str) -> None:
    fill(EmbeddingCache(tmp_path, ABOUT), items(5), numbers)
    changed = EmbeddingCache(tmp_path, {**ABOUT, part: "other"})
    assert changed.notices == [f"5 cached vectors of toy were computed with another {part}; all are computed again"]
    assert fill(changed, items(5), numbers) == 5
    assert EmbeddingCache(tmp_path, {**ABOUT, "model": "another"}).notices == []


def test_equal_content_has_one_key_and_every_difference_another(tmp_path: Path) -> None:
    for name, color in (("a", "red"), ("b", "red"), ("c", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
    a, b, c = (ImageRef(path=str(tmp_path / f"{name}.png"), origin=name) for name in "abc")
    key = InputKeys()
    assert key(EmbeddingInput("x", (a,))) == key(EmbeddingInput("x", (b,)))
    different = [
        EmbeddingInput("x", (a,)),
        EmbeddingInput("x", (c,)),
        EmbeddingInput("x"),
        EmbeddingInput("x", (a, a)),
        EmbeddingInput("x", (a,), instruction="i"),
        EmbeddingInput(None, (a,)),
        EmbeddingInput("", (a,)),
        EmbeddingInput("xi", (a,)),
    ]
    assert len({key(item) for item in different}) == len(different)
    with pytest.raises(UserError, match=r"gone\.png"):
        key(EmbeddingInput("x", (ImageRef(path=str(tmp_path / "gone.png")),)))


def test_a_shard_without_its_keys_or_cut_short_is_computed_again(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, ABOUT)
    fill(cache, items(9), numbers, part_size=3)
    first, second, third = sorted(cache.folder.glob("*.keys"))
    first.unlink()  # killed between the two files
    second.with_suffix(".npy").write_bytes(second.with_suffix(".npy").read_bytes()[:40])
    third.write_bytes(third.read_bytes()[:-5])
    again = EmbeddingCache(tmp_path, ABOUT)
    assert len(again) == 0
    assert len(again.notices) == 2 and all("computed again" in notice for notice in again.notices)
    assert fill(again, items(9), numbers, part_size=3) == 9
    assert again.rows(list(items(9)))[:][:, 0].tolist() == list(range(9))


def _fill_share(root: Path, rank: int, world_size: int) -> None:
    fill(EmbeddingCache(root, ABOUT), items(200), numbers, part_size=7, share=(rank, world_size))


def test_processes_that_share_a_store_write_the_whole_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill_share, args=(tmp_path, rank, 2)) for rank in range(2)]
    workers += [context.Process(target=_fill_share, args=(tmp_path, 0, 1))]  # and one that knows of nobody
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    cache = EmbeddingCache(tmp_path, ABOUT)
    assert cache.rows(list(items(200)))[:][:, 0].tolist() == list(range(200))
    assert fill(cache, items(200), numbers) == 0


def test_a_store_can_be_listed_and_cleaned(tmp_path: Path) -> None:
    fill(EmbeddingCache(tmp_path, ABOUT), items(5), numbers)
    other = {**ABOUT, "model": "b"}
    fill(EmbeddingCache(tmp_path, other), items(3), numbers)
    found = {entry.model: entry for entry in list_cache(tmp_path)}
    assert {name: entry.num_vectors for name, entry in found.items()} == {"toy": 5, "b": 3}
    assert found["b"].fingerprint == fingerprint(other)
    with pytest.raises(UserError, match=f"nothing: no such.*{fingerprint(other)}"):
        clean_cache(tmp_path, ["nothing"])
    freed = clean_cache(tmp_path, [fingerprint(other)])
    assert freed == found["b"].num_bytes
    assert [entry.model for entry in list_cache(tmp_path)] == ["toy"]


UNDER_A_LIMIT = """
import os, resource, sys
from pathlib import Path
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from vlm2vec.retrieval.embedding_cache import EmbeddingCache
keys = [number.to_bytes(32, "big") for number in range(600)]
cache = EmbeddingCache(Path(sys.argv[1]), {"model": "toy"})
for number, key in enumerate(keys):
    cache.put([key], np.full((1, 4), number, np.float32))
cache = EmbeddingCache(Path(sys.argv[1]), {"model": "toy"})
before = len(os.listdir("/proc/self/fd"))
rows = cache.rows(keys)
assert cache.notices == [] and len(cache) == 600
assert [int(row[0]) for row in rows[:]] == list(range(600))
assert [int(rows[number][0]) for number in range(0, 600, 7)] == list(range(0, 600, 7))
print(len(os.listdir("/proc/self/fd")) - before)
"""


def test_a_cache_of_600_shards_holds_at_most_100_descriptors_under_a_limit_of_256(tmp_path: Path) -> None:
    command = [sys.executable, "-c", UNDER_A_LIMIT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < int(done.stdout) <= 100


@pytest.mark.parametrize("method", ["read_bytes", "open"])
def test_a_file_that_cannot_be_read_is_an_error_and_not_a_damaged_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    cache = EmbeddingCache(tmp_path, ABOUT)
    fill(cache, items(3), numbers)
    real = getattr(Path, method)

    def failing(path: Path, *arguments: object, **options: object) -> object:
        if path.suffix in (".keys", ".npy"):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, method, failing)
        with pytest.raises(OSError, match="Too many open files"):
            EmbeddingCache(tmp_path, ABOUT)
    assert fill(EmbeddingCache(tmp_path, ABOUT), items(3), numbers) == 0


def test_a_temporary_file_of_a_killed_process_is_no_shard_and_is_removed_when_it_is_old(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, ABOUT)
    fill(cache, items(3), numbers)
    left = cache.folder / ".1-abc.0badcafe.tmp.keys"
    left.write_bytes(b"half")
    again = EmbeddingCache(tmp_path, ABOUT)
    assert len(again) == 3 and again.notices == [] and list_cache(tmp_path)[0].num_vectors == 3
    assert clean_cache(tmp_path, []) == 0
    os.utime(left, (1, 1))
    assert clean_cache(tmp_path, []) == 4 and not left.exists()


def test_an_input_is_hashed_once_however_often_it_is_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str | None] = []
    monkeypatch.setattr(
        embedding_cache, "content_key", lambda item, digest: hashed.append(item.text) or content_key(item, digest)
    )
    keys, pool = InputKeys(), [EmbeddingInput(f"text {i}") for i in range(20)]
    assert keys.of(pool[:10]) == [content_key(item) for item in pool[:10]]
    assert keys.of(pool * 3) == [content_key(item) for item in pool] * 3 == list(map(keys, pool * 3))
    assert len(hashed) == 20
    monkeypatch.setattr(embedding_cache, "RECENT", 20)
    assert keys(EmbeddingInput("another")) == content_key(EmbeddingInput("another"))
    assert keys.of(pool) == [content_key(item) for item in pool]
