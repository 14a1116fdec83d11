"""Near pairs by bounds: the pairs of a full comparison, most of which are never compared in full."""

from __future__ import annotations

import numpy as np
import pytest

from vlm2vec.retrieval import near_pairs


def made(seed: int, num: int, dim: int, mean: float) -> np.ndarray:
    """Unit vectors, of which every fifth is close to the row before it; `mean` moves all cosines up."""
    random = np.random.default_rng(seed)
    vectors_ND = random.standard_normal((num, dim)) * (1 + np.arange(dim)) ** -0.2
    vectors_ND[:, 0] += mean
    vectors_ND[1::5] = vectors_ND[::5][: len(vectors_ND[1::5])] + 0.02 * random.standard_normal((1, dim))
    return (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32)


def all_wanted(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.ones(len(left), bool)


@pytest.mark.parametrize(
    ("dim", "mean", "threshold"), [(96, 0.0, 0.95), (96, 4.0, 0.97), (96, 0.0, 0.1), (8, 0.0, 0.9)]
)
def test_near_pairs_are_those_of_a_full_comparison(
    monkeypatch: pytest.MonkeyPatch, dim: int, mean: float, threshold: float
) -> None:
    monkeypatch.setattr(near_pairs, "BLOCK", 64)
    vectors_ND = made(0, 400, dim, mean)
    found = {
        pair
        for _, left, right in near_pairs.near_pairs(vectors_ND, threshold, all_wanted)
        for pair in zip(left.tolist(), right.tolist(), strict=True)
    }
    cosines = vectors_ND.astype(np.float64) @ vectors_ND.T.astype(np.float64)
    clear = np.abs(cosines - threshold) > 1e-6
    expected = {(i, j) for i, j in np.argwhere(np.triu(cosines >= threshold, 1)).tolist()}
    assert {(i, j) for i, j in found ^ expected if clear[i, j]} == set()
    assert len(expected) > 50


def test_few_pairs_are_compared_in_full_and_only_those_that_still_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_pairs, "BLOCK", 512)
    vectors_ND, compared, confirmed = made(1, 3000, 128, 0.0), [], near_pairs._confirmed

    def counted(vectors, start, other, pairs, threshold):  # type: ignore[no-untyped-def]
        compared.append(len(pairs[0]))
        return confirmed(vectors, start, other, pairs, threshold)

    monkeypatch.setattr(near_pairs, "_confirmed", counted)
    pairs = sum(len(left) for _, left, _ in near_pairs.near_pairs(vectors_ND, 0.95, all_wanted))
    assert pairs >= 600 and pairs <= sum(compared) < 3000**2 / 2 / 100
    compared.clear()
    list(near_pairs.near_pairs(vectors_ND, 0.95, lambda left, right: np.zeros(len(left), bool)))
    assert sum(compared) == 0


def test_the_bound_is_never_below_the_cosine() -> None:
    import torch

    vectors_ND = torch.from_numpy(made(2, 200, 64, 1.0))
    axes_DD = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q
    for width in (1, 16, 40):
        bounds = near_pairs._bounded(vectors_ND, axes_DD[:, :width])
        assert (bounds @ bounds.T - vectors_ND @ vectors_ND.T).min() > -near_pairs.SLACK
