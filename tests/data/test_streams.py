"""Streamed sets: the same pairs in any file format, an order determined by the seed, a few blocks in memory."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm2vec.data import records
from vlm2vec.data.records import read_train_records
from vlm2vec.data.sampler import BatchSampler
from vlm2vec.data.streams import WINDOW, StreamedSet, streamed_sets
from vlm2vec.errors import UserError

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c4944415408d763f8cfc000000301010018dd8db00000000049454e44ae426082"
)


def write_lines(path: Path, number: int, size: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"query": f"query {i} {'x' * size}", "target": {"text": f"target {i}"}} for i in range(number)]
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def write_table(path: Path, number: int, size: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {f"{side}_text": [f"{side} {i} {'x' * size}" for i in range(number)] for side in ("query", "target")}
    pq.write_table(pa.table({**texts, "query_image": [PIXEL] * number}), path, row_group_size=50)
    return path


def write_shard(path: Path, number: int, size: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for i in range(number):
            record = {"query": {"text": f"query {i} {'x' * size}", "image": "png"}, "target": f"target {i}"}
            for name, content in ((f"{i:05}.json", json.dumps(record).encode()), (f"{i:05}.png", PIXEL)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


WRITERS = {"a.jsonl": write_lines, "a.parquet": write_table, "a.tar": write_shard}


@pytest.mark.parametrize("name", WRITERS)
def test_a_streamed_set_has_the_pairs_that_reading_all_of_it_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BLOCK", 40)
    file = WRITERS[name](tmp_path / "set" / name, 130)
    everything = read_train_records(tmp_path / "set")
    streamed = StreamedSet(tmp_path / "set", "set")
    assert len(streamed) == 130 and sum(streamed.blocks) == 130 and len(streamed.blocks) > 2
    assert list(streamed) == everything
    assert streamed[77].origin.startswith(str(file)) and streamed[77].query.text.startswith("query 77")
    if name != "a.jsonl":
        assert streamed[77].query.images[0].read() == PIXEL
    few = streamed.only([3, 4, 41, 129])
    assert list(few) == [everything[i] for i in (3, 4, 41, 129)] and sum(few.blocks) == 4
    assert len(few.blocks) == len(streamed.blocks)


@pytest.mark.parametrize("name", WRITERS)
def test_reading_in_the_samplers_order_holds_a_few_blocks_however_long_the_set(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BLOCK", 20)
    peaks = []
    for number in (1_000, 4_000):
        path = WRITERS[name](tmp_path / f"{number}" / name, number, size=4_000)
        tracemalloc.start()
        streamed = StreamedSet(path, "set")
        sampler = BatchSampler([streamed.blocks], [1.0], batch_size=100, num_steps=8, seed=1)
        for batch in sampler:
            for i in batch:
                streamed[i]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4_000 * 4_000 / 2  # holding the set would take its texts
    if name != "a.tar":  # a shard's table of members grows with it, by some hundred bytes a record
        assert peaks[1] < 1.5 * peaks[0]


def test_a_pass_in_blocks_visits_every_pair_once_and_mixes_blocks() -> None:
    blocks = [50] * 20
    order = list(itertools.chain(*BatchSampler([blocks, 30], [1.0, 1e-9], 10, 100, seed=3)))
    assert sorted(order) == list(range(1000))
    assert len({i // 50 for i in order[:50]}) > WINDOW // 2
    assert order != list(itertools.chain(*BatchSampler([blocks, 30], [1.0, 1e-9], 10, 100, seed=4)))


def test_sets_of_records_are_found_beside_those_in_the_mmeb_layout(tmp_path: Path) -> None:
    write_lines(tmp_path / "One.jsonl", 3)
    write_table(tmp_path / "Two/train-0.parquet", 3)
    (tmp_path / "Three").mkdir()
    (tmp_path / "Three/original-0.parquet").touch()
    assert streamed_sets(tmp_path) == {"One": tmp_path / "One.jsonl", "Two": tmp_path / "Two"}
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"empty\.jsonl: contains no records of empty"):
        StreamedSet(tmp_path / "empty.jsonl", "empty")
