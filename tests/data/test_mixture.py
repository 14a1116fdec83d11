from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec.data.mixture import capped, set_weights


@given(st.integers(0, 60), st.integers(1, 80), st.integers(0, 9))
def test_a_cap_keeps_distinct_rows_in_their_order(number: int, cap: int, seed: int) -> None:
    rows = list(range(number))
    kept = capped(rows, cap, seed, "set")
    assert len(kept) == min(number, cap) and kept == sorted(set(kept))
    assert kept == capped(rows, cap, seed, "set")


def test_a_cap_chooses_by_chance_over_the_whole_set_and_by_seed_and_name() -> None:
    rows = list(range(1000))
    kept = capped(rows, 100, 0, "a")
    assert 300 < sum(kept) / len(kept) < 700 and kept != rows[:100]
    assert kept != capped(rows, 100, 1, "a") and kept != capped(rows, 100, 0, "b")
    assert capped(rows, None, 0, "a") == rows


def test_sizes_are_flattened_by_the_exponent_and_given_weights_stay() -> None:
    sizes = {"large": 10000, "small": 100, "own": 7}
    given_weights = {"own": 3.0, "small": None}
    assert set_weights(sizes, given_weights, 1.0) == {"large": 10000, "small": 100, "own": 3}
    assert set_weights(sizes, given_weights, 0.5) == pytest.approx({"large": 100, "small": 10, "own": 3})
    assert set_weights(sizes, given_weights, 0.0) == {"large": 1, "small": 1, "own": 3}
