"""Ranking without sorting compared with explicit computation and with sorting."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec.retrieval.rank import gold_rank, top_k


def test_the_best_candidate_has_rank_one() -> None:
    assert gold_rank(np.array([0.9, 0.1, 0.5]), (0,)) == 1
    assert gold_rank(np.array([0.1, 0.9, 0.5]), (0,)) == 3


def test_a_candidate_that_ties_with_the_gold_stands_before_it() -> None:
    assert gold_rank(np.array([0.5, 0.5, 0.1]), (0,)) == 2
    assert gold_rank(np.array([0.5, 0.5, 0.5]), (2,)) == 3


def test_constant_scores_put_the_gold_last_wherever_it_is() -> None:
    scores = np.zeros(10)
    assert [gold_rank(scores, (place,)) for place in range(10)] == [10] * 10


def test_a_gold_whose_score_is_not_a_number_is_last() -> None:
    assert gold_rank(np.array([np.nan, 0.2, 0.1]), (0,)) == 3


def test_a_candidate_whose_score_is_not_a_number_stands_before_the_gold() -> None:
    assert gold_rank(np.array([0.9, np.nan, 0.1]), (0,)) == 2


def test_with_several_golds_the_best_one_counts_and_the_others_are_not_in_its_way() -> None:
    scores = np.array([0.3, 0.9, 0.9, 0.5])
    assert gold_rank(scores, (1, 2)) == 1
    assert gold_rank(scores, (0, 3)) == 3


def test_a_single_candidate_that_is_gold_is_first() -> None:
    assert gold_rank(np.array([-1.0]), (0,)) == 1


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=40, unique=True), st.data())
def test_without_ties_the_rank_is_the_place_in_the_sorted_order(values: list[int], data: st.DataObject) -> None:
    gold = data.draw(st.integers(0, len(values) - 1))
    scores = np.array(values, dtype=np.float32)
    assert gold_rank(scores, (gold,)) == 1 + list(np.argsort(-scores)).index(gold)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.data())
def test_the_rank_is_the_worst_of_all_orders_of_equal_scores(values: list[int], data: st.DataObject) -> None:
    gold = data.draw(st.integers(0, len(values) - 1))
    assert gold_rank(np.array(values, dtype=np.float32), (gold,)) == sum(v >= values[gold] for v in values)


def test_the_first_k_are_best_first_and_equal_scores_keep_their_order() -> None:
    assert top_k(np.array([0.1, 0.7, 0.9, 0.7]), 3).tolist() == [2, 1, 3]


def test_the_first_k_of_fewer_candidates_are_all_of_them() -> None:
    assert top_k(np.array([0.1, 0.7]), 5).tolist() == [1, 0]
