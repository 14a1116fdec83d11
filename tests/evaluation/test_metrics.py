"""Scores and means compared with hand-computed tables and with trec_eval."""

from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval

from vlm2vec.evaluation.metrics import (
    CUTS,
    METRICS,
    TASK_METRICS,
    Ranked,
    all_metrics,
    average_precision_capped,
    chance_of,
    group_means,
    mean_interval,
    values_of,
)

TREC = {"hit": "success", "precision": "P", "recall": "recall", "map": "map_cut", "ndcg_linear": "ndcg_cut"}


def random_queries(seed: int) -> tuple[list[Ranked], dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """Queries with up to 12 graded relevant candidates of 40, as ours and as trec_eval takes them."""
    random = np.random.default_rng(seed)
    queries, judged, run = [], {}, {}
    for number in range(60):
        count = int(random.integers(1, 13))
        ranks = [int(rank) for rank in 1 + random.choice(40, count, replace=False)]
        gains = [int(gain) for gain in random.integers(1, 4, count)]
        queries.append(Ranked(tuple(ranks), tuple(map(float, gains))))
        judged[f"q{number}"] = {f"d{rank}": gain for rank, gain in zip(ranks, gains, strict=True)}
        run[f"q{number}"] = {f"d{rank}": 100.0 - rank for rank in range(1, 41)}
    return queries, judged, run


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", TREC)
def test_every_metric_is_that_of_trec_eval_query_by_query(name: str, seed: int) -> None:
    queries, judged, run = random_queries(seed)
    for k in CUTS:
        found = pytrec_eval.RelevanceEvaluator(judged, {f"{TREC[name]}_{k}"}).evaluate(run)
        expected = [found[f"q{number}"][f"{TREC[name]}_{k}"] for number in range(len(queries))]
        assert values_of(f"{name}@{k}", queries) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_exponential_gain_is_the_linear_one_of_gains_made_exponential(seed: int) -> None:
    queries, judged, run = random_queries(seed)
    powers = {q: {d: 2**gain - 1 for d, gain in grades.items()} for q, grades in judged.items()}
    found = pytrec_eval.RelevanceEvaluator(powers, {"ndcg_cut_10"}).evaluate(run)
    expected = [found[f"q{number}"]["ndcg_cut_10"] for number in range(len(queries))]
    assert values_of("ndcg_exponential@10", queries) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_reciprocal_rank_is_that_of_trec_eval_cut_at_k(seed: int) -> None:
    queries, judged, run = random_queries(seed)
    for k in CUTS:
        first = {q: dict(list(scores.items())[:k]) for q, scores in run.items()}
        found = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(first)
        expected = [found[f"q{number}"]["recip_rank"] for number in range(len(queries))]
        assert values_of(f"mrr@{k}", queries) == pytest.approx(expected, abs=1e-9)


def test_f1_is_the_harmonic_mean_of_trec_evals_precision_and_recall() -> None:
    queries, judged, run = random_queries(9)
    found = pytrec_eval.RelevanceEvaluator(judged, {"P_5", "recall_5"}).evaluate(run)
    pairs = [(found[f"q{number}"]["P_5"], found[f"q{number}"]["recall_5"]) for number in range(len(queries))]
    expected = [2 * p * r / (p + r) if p + r else 0.0 for p, r in pairs]
    assert values_of("f1@5", queries) == pytest.approx(expected, abs=1e-9)


def test_the_reference_evaluators_average_precision_divides_by_what_could_be_found() -> None:
    query = Ranked((1, 3, 11))
    assert values_of("map@1", [query])[0] == pytest.approx(1 / 3)
    assert average_precision_capped(query, 1) == 1.0
    assert average_precision_capped(query, 5) == values_of("map@5", [query])[0] == pytest.approx((1 + 2 / 3) / 3)


def test_one_relevant_candidate_at_rank_three_by_hand() -> None:
    found = all_metrics([Ranked((3,))])
    assert set(found) == {f"{name}@{k}" for name in METRICS for k in CUTS}
    assert (found["hit@1"], found["hit@5"], found["recall@5"], found["precision@5"]) == (0.0, 1.0, 1.0, 0.2)
    assert found["f1@5"] == pytest.approx(1 / 3)
    assert found["ndcg_linear@5"] == found["ndcg_exponential@5"] == 0.5
    assert found["map@5"] == found["mrr@5"] == pytest.approx(1 / 3)


def test_the_interval_holds_the_mean_and_narrows_with_the_number_of_queries() -> None:
    few, many = (np.tile([0.0, 0.5, 0.0, 1.0], n) for n in (10, 1000))
    deviation = float(np.std([0.0, 0.5, 0.0, 1.0]))
    low, high = mean_interval(few)
    assert low < 0.375 < high
    assert (high - low) / 2 == pytest.approx(1.96 * deviation / np.sqrt(40), rel=0.15)
    low, high = mean_interval(many)
    assert (high - low) / 2 == pytest.approx(1.96 * deviation / np.sqrt(4000), rel=0.15)
    assert mean_interval(many) == (low, high)


@pytest.mark.parametrize(("hits", "queries"), [(0, 168), (7, 200), (500, 1000), (12, 12)])
def test_the_interval_of_hits_is_wilsons(hits: int, queries: int) -> None:
    low, high = mean_interval(np.arange(queries) < hits)
    # The ends are where the observed share lies 1.96 standard deviations of the end's own share away.
    for end in {low, high} - {0.0, 1.0}:
        assert abs(hits / queries - end) == pytest.approx(1.95996 * np.sqrt(end * (1 - end) / queries), rel=1e-4)
    assert (low == 0.0, high == 1.0) == (hits == 0, hits == queries)


def test_a_group_score_is_the_unweighted_mean_over_its_tasks() -> None:
    scores = {"A": 0.2, "B": 0.4, "C": 0.9}
    groups = {"A": ("classification", "ind"), "B": ("classification", "ood"), "C": ("grounding", "ood")}
    assert group_means(scores, groups) == pytest.approx(
        {"classification": 0.3, "grounding": 0.9, "ind": 0.2, "ood": 0.65, "overall": 0.5}
    )


def test_groups_without_tasks_are_left_out() -> None:
    assert list(group_means({"A": 0.5}, {"A": ("vqa", "ind")})) == ["vqa", "ind", "overall"]


@pytest.mark.parametrize("name", TASK_METRICS)
def test_chance_is_the_mean_over_random_orders(name: str) -> None:
    random = np.random.default_rng(0)
    gains = (3.0, 1.0, 2.0)
    orders = [Ranked(tuple(int(rank) for rank in 1 + random.permutation(8)[:3]), gains) for _ in range(6000)]
    assert chance_of(name, gains, 8) == pytest.approx(values_of(name, orders).mean(), abs=0.02)
