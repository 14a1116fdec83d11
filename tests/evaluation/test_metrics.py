"""Scores and means against tables made by hand."""

import pytest

from vlm2vec.evaluation.metrics import group_means, hit_at


@pytest.mark.parametrize(
    ("ranks", "k", "score"),
    [
        ([1, 1, 1, 1], 1, 1.0),
        ([1, 2, 1, 3], 1, 0.5),
        ([2, 2, 7, 3], 1, 0.0),
        ([2, 2, 7, 3], 2, 0.5),
        ([2, 5, 6, 1], 5, 0.75),
    ],
)
def test_hits_are_the_share_of_queries_with_the_gold_among_the_first_k(ranks: list[int], k: int, score: float) -> None:
    assert hit_at(ranks, k) == score


def test_a_group_score_is_the_unweighted_mean_over_its_tasks() -> None:
    scores = {"A": 0.2, "B": 0.4, "C": 0.9}
    groups = {"A": ("classification", "ind"), "B": ("classification", "ood"), "C": ("grounding", "ood")}
    assert group_means(scores, groups) == pytest.approx(
        {"classification": 0.3, "grounding": 0.9, "ind": 0.2, "ood": 0.65, "overall": 0.5}
    )


def test_groups_without_tasks_are_left_out() -> None:
    assert list(group_means({"A": 0.5}, {"A": ("vqa", "ind")})) == ["vqa", "ind", "overall"]
