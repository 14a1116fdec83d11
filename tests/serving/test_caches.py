"""Caches stay within their budget in bytes and return what would be computed again."""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from tiny.models import draw_image
from wire import data_uri, encoded, post

from vlm2vec.serving.batching import Embedded
from vlm2vec.serving.caches import LRU, result_cache
from vlm2vec.types import EmbeddingInput, content_key


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=60), st.integers(0, 100))
def test_a_cache_stays_within_its_budget_and_evicts_the_least_recently_used(
    puts: list[tuple[int, int]], budget: int
) -> None:
    cache: LRU[int] = LRU(budget, lambda value: value)
    kept: list[tuple[int, int]] = []  # a plain implementation: newest last
    for key, size in puts:
        cache.put(key, size)
        kept = [one for one in kept if one[0] != key]
        if size <= budget:
            kept.append((key, size))
        while sum(size for _, size in kept) > budget:
            kept.pop(0)
        assert cache.num_bytes == sum(size for _, size in kept) <= budget and len(cache) == len(kept)
    for key, size in kept:
        assert cache.get(key) == size


@pytest.mark.parametrize("dim", [64, 768, 4096])
def test_cached_vectors_are_counted_at_their_real_size(dim: int) -> None:
    count = 3000
    cache: LRU[Embedded] = result_cache(1 << 30)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            key = content_key(EmbeddingInput(text=f"text {number}"))
            cache.put(key, Embedded(np.zeros((4, dim), np.float32)[0].copy(), 1000 + number))
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.8 * cache.num_bytes <= used <= cache.num_bytes


def test_memory_is_flat_once_the_caches_are_full(serving: Callable[..., TestClient]) -> None:
    client = serving(result_cache_bytes=200_000)

    def traced(start: int) -> int:
        for begin in range(start, start + 600, 100):
            assert post(client, input=[f"text {number}" for number in range(begin, begin + 100)]).status_code == 200
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        traced(0)  # fills the cache
        first = traced(1000)
        assert traced(2000) - first < 50_000
    finally:
        tracemalloc.stop()


SHAPES = """
import os, psutil, sys, torch
from vlm2vec.serving.memory import bound_kernel_caches
if sys.argv[1] == "bounded":
    bound_kernel_caches()
torch.set_num_threads(1)
layers = [torch.nn.Linear(m, n, dtype=torch.bfloat16) for m, n in ((576, 1536), (1536, 576), (576, 576))]
process = psutil.Process()
with torch.inference_mode():
    def grow(begin, end):
        for rows in range(begin, end):
            for layer in layers:
                layer(torch.zeros(rows, layer.in_features, dtype=torch.bfloat16))
        return process.memory_info().rss
    first = grow(10, 60)
    print(grow(60, 260) - first)
"""


def test_kernels_of_new_shapes_are_not_kept_for_ever() -> None:
    grown = {
        mode: int(
            subprocess.run([sys.executable, "-c", SHAPES, mode], capture_output=True, text=True, check=True).stdout
        )
        for mode in ("bounded", "default")
    }
    assert grown["bounded"] < 8 << 20
    if torch.cpu.get_capabilities().get("avx512_bf16"):  # elsewhere other kernels compute, without such a cache
        assert grown["default"] > 50 << 20


def vectors_of(answer: Any) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]])


@pytest.fixture
def passes(embedder: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of inputs in each forward pass."""
    usual, sizes = embedder.backbone.forward, []

    def forward(batch: Any) -> Any:
        sizes.append(len(batch.lengths()))
        return usual(batch)

    monkeypatch.setattr(embedder.backbone, "forward", forward)
    return sizes


def test_equal_inputs_are_computed_once(serving: Callable[..., TestClient], passes: list[int], png: bytes) -> None:
    client = serving()
    both = {"text": "in red", "image": data_uri(png)}
    first = vectors_of(post(client, input=["a dog", both, "a dog"]))
    assert sum(passes) == 2
    again = vectors_of(post(client, input=[both, "a dog"]))
    assert sum(passes) == 2 and np.array_equal(again, first[1::-1])
    vectors_of(post(client, input=["a dog"], instruction="Find it"))
    assert sum(passes) == 3
    assert 'vlm2vec_result_cache_total{hit="true"} 2.0' in client.get("/metrics").text


def test_a_budget_of_zero_disables_the_cache(serving: Callable[..., TestClient], passes: list[int]) -> None:
    client = serving(result_cache_bytes=0)
    for _ in range(2):
        post(client, input="a dog")
    assert sum(passes) == 2


def test_image_features_are_computed_once_and_evicted_over_the_budget(
    embedder: Any, serving: Callable[..., TestClient]
) -> None:
    images = [encoded(draw_image(40, 30, seed=seed)) for seed in range(6)]
    inputs = [{"text": f"text {number}", "image": data_uri(images[number % 2])} for number in range(6)]
    client = serving()
    kept = embedder.backbone.vision_cache.kept
    made = vectors_of(post(client, input=inputs))
    assert len(kept) == 2
    want = embedder.encode([{"text": one["text"], "image": images[i % 2]} for i, one in enumerate(inputs)])
    assert (made * want).sum(axis=1).min() >= 0.9999
    small = serving(image_cache_bytes=2 * kept.num_bytes)
    vectors_of(post(small, input=[{"image": data_uri(data)} for data in images]))
    assert len(embedder.backbone.vision_cache.kept) == 4
