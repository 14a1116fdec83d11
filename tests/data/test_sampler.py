from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec import UserError
from vlm2vec.data.sampler import BatchSampler


def batches(**changes: object) -> list[list[int]]:
    settings: dict[str, object] = {
        "sizes": [30, 10],
        "weights": [3, 1],
        "batch_size": 8,
        "num_steps": 20,
        "seed": 0,
    }
    return list(BatchSampler(**{**settings, **changes}))  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_batches_and_another_seed_does_not() -> None:
    assert batches() == batches()
    assert batches() != batches(seed=1)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from(["mixed", "single", "interleaved"]), st.integers(0, 99))
def test_the_processes_together_see_what_one_would(num_processes: int, batching: str, seed: int) -> None:
    how = {"batching": batching, "seed": seed, "sub_batch_size": 4}
    whole = batches(**how)
    parts = [batches(**how, rank=r, num_processes=num_processes) for r in range(num_processes)]
    assert whole == [[index for part in parts for index in part[step]] for step in range(len(whole))]


def test_a_set_is_seen_whole_before_any_of_it_repeats() -> None:
    seen = [index for batch in batches(sizes=[24], weights=[1], num_steps=6) for index in batch]
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
    assert seen[:24] != seen[24:]


def test_batches_of_one_set_hold_one_set_only() -> None:
    for batch in batches(batching="single"):
        assert len({index < 30 for index in batch}) == 1


def test_sub_batches_hold_one_set_each_and_a_batch_holds_several() -> None:
    drawn = batches(batching="interleaved", sub_batch_size=4, num_steps=40)
    kinds = [[{index < 30 for index in batch[i : i + 4]} for i in (0, 4)] for batch in drawn]
    assert all(len(kind) == 1 for both in kinds for kind in both)
    assert any(both[0] != both[1] for both in kinds)
    share = sum(kind == {True} for both in kinds for kind in both) / 80
    assert 0.6 < share < 0.9


def test_a_sub_batch_as_large_as_the_batch_is_a_batch_of_one_set() -> None:
    assert batches(batching="interleaved", sub_batch_size=64) == batches(batching="single")


def test_a_sub_batch_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(UserError, match="sub_batch_size 3: expected a divisor of batch_size 8"):
        batches(batching="interleaved", sub_batch_size=3)


def test_going_on_in_the_middle_is_skipping_the_first_batches() -> None:
    whole = batches(batching="interleaved", sub_batch_size=4)
    assert batches(batching="interleaved", sub_batch_size=4, num_steps=7) == whole[:7]


def test_mixed_batches_follow_the_weights() -> None:
    seen = Counter(index < 30 for batch in batches(num_steps=500) for index in batch)
    assert seen[True] / seen.total() == pytest.approx(0.75, abs=0.02)


def test_a_batch_that_the_processes_cannot_share_evenly_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size 8: expected a multiple of the 3 processes"):
        batches(num_processes=3)
