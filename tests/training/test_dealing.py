"""Inputs are dealt to ranks by tokens; tests/training/test_sharding.py holds loss and gradient against one process."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vlm2vec.training.dealing import TOLERANCE, deal

LENGTHS = st.lists(st.lists(st.integers(1, 3000), min_size=1, max_size=40), min_size=1, max_size=6)


def sums(lengths: list[list[int]], owners: list[list[int]]) -> list[int]:
    found = [0] * len(lengths)
    for mine, places in zip(lengths, owners, strict=True):
        for length, owner in zip(mine, places, strict=True):
            found[owner] += length
    return found


@given(LENGTHS)
def test_every_input_has_one_rank_every_rank_an_input_and_the_busiest_has_no_more_than_before(
    lengths: list[list[int]],
) -> None:
    owners = deal(lengths)
    assert [len(mine) for mine in owners] == [len(mine) for mine in lengths]
    assert {owner for mine in owners for owner in mine} == set(range(len(lengths)))
    found = sums(lengths, owners)
    assert max(found) <= max(sum(mine) for mine in lengths)
    longest = max(max(mine) for mine in lengths)
    assert max(found) <= (1 + TOLERANCE) * sum(found) / len(found) + longest


@given(LENGTHS)
def test_the_deal_is_the_same_on_every_rank(lengths: list[list[int]]) -> None:
    assert deal(lengths) == deal([list(mine) for mine in lengths])


def test_balanced_ranks_keep_what_they_read() -> None:
    assert deal([[5, 7], [6, 6], [12]]) == [[0, 0], [1, 1], [2]]


def test_few_inputs_move() -> None:
    owners = deal([[100] * 8, [100] * 4])
    assert sum(owner for owner in owners[0]) == 2 and owners[1] == [1] * 4
