"""Batches prepared in advance stay within their bytes and within the shared memory."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tuning import recipe

from vlm2vec.data.examples import TrainExample
from vlm2vec.errors import UserError
from vlm2vec.training import prefetch
from vlm2vec.training.prefetch import GIB, SHARE, batch_bytes, processes
from vlm2vec.training.run import build_embedder
from vlm2vec.training.trainer import ContrastiveTrainer
from vlm2vec.types import EmbeddingInput


@given(st.integers(1, 64), st.integers(1, 10**7), st.integers(1, 10**9), st.one_of(st.none(), st.integers(1, 10**9)))
def test_prepared_batches_and_the_one_in_use_stay_within_limit_and_shared_memory(
    wanted: int, size: int, limit: int, free: int | None
) -> None:
    if free is not None and 2 * size > SHARE * free:
        with pytest.raises(UserError, match="--shm-size"):
            processes(wanted, size, limit, free)
        return
    count, ahead = processes(wanted, size, limit, free)
    assert 1 <= count <= wanted and 1 <= ahead <= 2
    held = (count * ahead + 1) * size
    assert free is None or held <= SHARE * free
    assert held <= limit or count == ahead == 1


def test_plenty_of_memory_leaves_the_number_of_processes_as_it_is() -> None:
    assert processes(8, 10, 10_000, None) == (8, 2)
    assert processes(8, 10, 100, None) == (8, 1)
    assert processes(8, 10, 50, 10_000) == (4, 1)


def trainer(base: str, folder: Any, **data: Any) -> ContrastiveTrainer:
    train = {"steps": 2, "bf16": False, "batch_size": 8}
    settings = recipe(base, lora={"dropout": 0.0}, train=train, data={"root": folder, **data})
    pairs = [TrainExample(EmbeddingInput(f"query {i}"), EmbeddingInput(f"target {i}")) for i in range(40)]
    return ContrastiveTrainer(build_embedder(settings), settings, {"set": pairs}, folder)


def test_the_loader_of_a_run_is_bounded_by_the_bytes_of_its_batches(
    tiny_qwen2_vl: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tiny_qwen2_vl, tmp_path, num_workers=2)
    loader = made.get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor) == (2, 2)
    first = next(iter(loader.batch_sampler))
    size = batch_bytes(made._collate([made.train_dataset[number] for number in first])["pairs"])
    with caplog.at_level(logging.WARNING):
        made = trainer(tiny_qwen2_vl, tmp_path, num_workers=2, prefetch_gib=2.5 * size / GIB)
        loader = made.get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor) == (1, 1)
    assert "data.num_workers 2: reduced to 1" in caplog.text
    monkeypatch.setattr(prefetch, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=size)))
    with pytest.raises(UserError, match=r"/dev/shm has only 0.00 GiB free; start the container with --shm-size=1g"):
        made.get_train_dataloader()
