"""The streamed ranking compared with sorting, and the metrics compared with trec_eval."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm2vec.retrieval.rank import DEPTH, best_candidates, exact_scores, rank_relevant, top_k

Cases = tuple[np.ndarray, np.ndarray, list[list[int]], list[list[float]]]


def sorted_by_hand(queries: np.ndarray, candidates: np.ndarray, relevant: list[list[int]], gains: list[list[float]]):
    """Ranks from a full sort with the rule of ties written out."""
    found = []
    for query, places, worth in zip(queries, relevant, gains, strict=True):
        scores = exact_scores(query.astype(np.float64), candidates)
        grade = dict(zip(places, worth, strict=True))
        order = sorted(
            range(len(candidates)),
            key=lambda i: (-scores[i], i in grade, grade.get(i, 0), places.index(i) if i in grade else 0),
        )
        place = {candidate: rank for rank, candidate in enumerate(order, start=1)}
        found.append([min(place[i], DEPTH + 1) for i in places])
    return found


def cases(seed: int, num_queries: int, num_candidates: int, dim: int, kind: str) -> Cases:
    random = np.random.default_rng(seed)
    if kind == "ties":  # few distinct vectors and few distinct scores
        queries = random.integers(-1, 2, (num_queries, dim)).astype(np.float32)
        candidates = random.integers(-1, 2, (num_candidates, dim)).astype(np.float32)
    else:
        queries, candidates = (
            random.standard_normal((n, dim), dtype=np.float32) for n in (num_queries, num_candidates)
        )
        if kind == "collapsed":
            candidates = 1 + 1e-5 * candidates
    most = min(5, num_candidates)
    relevant = [
        random.choice(num_candidates, random.integers(1, most + 1), replace=False).tolist() for _ in range(num_queries)
    ]
    gains = [random.integers(1, 4, len(places)).astype(float).tolist() for places in relevant]
    return queries, candidates, relevant, gains


@pytest.mark.parametrize("kind", ["ties", "plain", "collapsed"])
@pytest.mark.parametrize("screen", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [7, 64, 1000])
def test_streaming_gives_the_ranks_of_a_full_sort(kind: str, screen: torch.dtype, block: int) -> None:
    queries, candidates, relevant, gains = cases(3, 20, 300, 6 if kind == "ties" else 48, kind)
    found = rank_relevant(queries, candidates, relevant, gains, block=block, screen=screen)
    assert found == sorted_by_hand(queries, candidates, relevant, gains)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 3))
def test_with_many_ties_it_is_still_the_full_sort(seed: int, num_candidates: int, dim: int) -> None:
    queries, candidates, relevant, gains = cases(seed, 4, num_candidates, dim, "ties")
    found = rank_relevant(queries, candidates, relevant, gains, block=16)
    assert found == sorted_by_hand(queries, candidates, relevant, gains)


@pytest.mark.parametrize("screen", [torch.float32, torch.bfloat16])
def test_equal_vectors_tie_wherever_they_stand_in_the_blocks(screen: torch.dtype) -> None:
    vector = np.random.default_rng(0).standard_normal((1, 100), dtype=np.float32)
    found = rank_relevant(np.repeat(vector, 3, 0), np.repeat(vector, 50, 0), [[0], [20], [49]], block=16, screen=screen)
    assert found == [[DEPTH + 1]] * 3


def test_what_is_not_a_number_is_against_the_gold() -> None:
    candidates = np.eye(4, dtype=np.float32)
    candidates[3] = np.nan
    assert rank_relevant(np.eye(4, dtype=np.float32)[:1], candidates, [[0]]) == [[2]]
    assert rank_relevant(np.eye(4, dtype=np.float32)[:1], candidates, [[3]]) == [[4]]


def test_a_memory_map_is_read_in_blocks(tmp_path) -> None:
    queries, candidates, relevant, gains = cases(5, 10, 500, 16, "plain")
    np.save(tmp_path / "candidates.npy", candidates)
    mapped = np.load(tmp_path / "candidates.npy", mmap_mode="r")
    assert rank_relevant(queries, mapped, relevant, gains, block=100) == rank_relevant(
        queries, candidates, relevant, gains
    )


@pytest.mark.parametrize("kind", ["ties", "plain"])
def test_the_best_candidates_in_blocks_are_those_of_one_sort(kind: str) -> None:
    queries, candidates, _, _ = cases(4, 3, 100, 4, kind)
    for query in queries:
        scores = exact_scores(query.astype(np.float64), candidates)
        places, found = best_candidates(query, candidates, 5, block=16)
        assert places.tolist() == top_k(scores, 5).tolist()
        assert found.tolist() == scores[places].tolist()
