"""Which inputs share a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from tiny.dual import DUAL
from wire import data_uri, post

from vlm2vec import Embedder
from vlm2vec.serving.batching import Budget, Job, take_batch
from vlm2vec.types import EmbeddingInput


class Future:
    """The future of a request; `left`: the client disconnected."""

    def __init__(self, left: bool = False) -> None:
        self.left = left

    def cancelled(self) -> bool:
        return self.left


def jobs(lengths: list[int], left: tuple[int, ...] = ()) -> list[Job]:
    made = [Job(EmbeddingInput(text="x"), cast(Any, Future(place in left))) for place in range(len(lengths))]
    for job, length in zip(made, lengths, strict=True):
        job.num_tokens = length
    return made


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=40),
    st.integers(1, 2000),
    st.integers(1, 20),
    st.floats(0, 0.9),
)
def test_batches_stay_within_the_budget_and_every_input_is_processed(
    lengths: list[int], tokens: int, inputs: int, padding: float
) -> None:
    waiting = jobs(lengths)
    left, turns = list(waiting), []
    while left:
        oldest = left[0]
        batch = take_batch(left, Budget(tokens, inputs, padding))
        assert batch[0] is oldest and not set(map(id, batch)) & set(map(id, left))
        sizes = [job.num_tokens for job in batch]
        padded = len(sizes) * max(sizes)
        if len(sizes) > 1:
            assert len(sizes) <= inputs and padded <= tokens and padded - sum(sizes) <= padding * padded
        turns += batch
    assert sorted(map(id, turns)) == sorted(map(id, waiting))


def test_inputs_of_similar_length_share_a_batch() -> None:
    waiting = jobs([20, 200, 21, 220, 19, 18])
    assert [job.num_tokens for job in take_batch(waiting, Budget(4096, 64, 0.2))] == [20, 21, 19, 18]
    assert [job.num_tokens for job in take_batch(waiting, Budget(4096, 64, 0.2))] == [200, 220]
    assert waiting == []


def test_cancelled_jobs_are_dropped() -> None:
    waiting = jobs([5, 5, 5], left=(0, 2))
    assert len(take_batch(waiting, Budget(100, 8, 0.2))) == 1 and waiting == []
    assert take_batch(jobs([5], left=(0,)), Budget(100, 8, 0.2)) == []


def test_the_server_counts_an_image_of_a_dual_encoder_as_encode_does(
    serving: Callable[..., TestClient], png: bytes, tmp_path: Path
) -> None:
    DUAL["clip"](tmp_path)
    clip = Embedder.from_pretrained(tmp_path)
    answer = post(serving(clip), input=[{"image": data_uri(png)}]).json()
    item = EmbeddingInput.of({"image": png})
    assert answer["usage"]["total_tokens"] == clip.backbone.costs(clip.backbone.process([item]))[0] == 17
    refused = post(serving(clip, max_tokens=16), input=[{"image": data_uri(png)}])
    assert refused.status_code == 413 and refused.json()["error"]["code"] == "too_many_tokens"
