"""`train.chunk_tokens: auto`: planned for the GPU's memory, and halved once on out of memory."""

from __future__ import annotations

import pytest
import torch

from vlm2vec.errors import UserError
from vlm2vec.training.chunks import ChunkBudget, chunk_tokens_of
from vlm2vec.training.config import Recipe, TrainSettings

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def recipe(base: str = "Qwen/Qwen2-VL-2B-Instruct", tokens: object = "auto") -> Recipe:
    values = {
        "model": {"base": base},
        "data": {"root": "."},
        "train": {"steps": 2, "chunk_tokens": tokens},
        "output": "x",
    }
    return Recipe.model_validate(values)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch):
    """`memory(gib)`: the size of the pretended GPU."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return lambda gib: monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, gib * 2**30))


def test_a_larger_gpu_takes_larger_mini_batches(memory) -> None:
    found = []
    for gib in (8, 24, 80):
        memory(gib)
        found.append(chunk_tokens_of(recipe(), GPU))
    assert found == sorted(found) and found[0] < found[1] < found[2]
    assert chunk_tokens_of(recipe("compact"), GPU) == 4096
    assert chunk_tokens_of(recipe(), CPU) == 2048
    assert chunk_tokens_of(recipe(tokens=100), GPU) == 100 and chunk_tokens_of(recipe(tokens=None), GPU) is None


def test_too_little_memory_halves_once_and_clears_what_was_begun(memory) -> None:
    memory(80)
    budget = ChunkBudget(recipe(), GPU)
    first, tried, cleared = budget.settings.chunk_tokens, [], []

    def step(settings: TrainSettings) -> str:
        tried.append(settings.chunk_tokens)
        if settings.chunk_tokens == first:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert budget.run(step, lambda: cleared.append(True)) == "done"
    assert budget.run(step, lambda: cleared.append(True)) == "done"
    assert tried == [first, first // 2, first // 2] and cleared == [True]


@pytest.mark.parametrize("tokens", ["auto", 4096])
def test_then_the_run_ends_with_what_to_change(memory, tokens: object) -> None:
    memory(80)

    def step(settings: TrainSettings) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="out of GPU memory; halve it"):
        ChunkBudget(recipe(tokens=tokens), GPU).run(step, lambda: None)
