from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec.losses import equal_target_mask, info_nce


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("num_targets", [2, 7, 64])
def test_zero_embeddings_give_the_log_of_the_number_of_targets(num_targets: int) -> None:
    zeros = torch.zeros(2, 5)
    loss = info_nce(zeros, torch.zeros(num_targets, 5), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(math.log(num_targets), rel=1e-6)


def test_two_orthogonal_pairs_give_the_softplus_of_the_sharpened_gap() -> None:
    eye = torch.eye(2)
    loss = info_nce(eye, eye, torch.arange(2), temperature=0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1 / 0.5)), rel=1e-5)


def test_temperature_divides() -> None:
    queries, targets, index = unit(4, 8, 0), unit(6, 8, 1), torch.arange(4)
    plain = F.cross_entropy(queries @ targets.T / 0.02, index)
    torch.testing.assert_close(info_nce(queries, targets, index, 0.02), plain)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        info_nce(torch.eye(2), torch.eye(2), torch.arange(2), temperature=0)


@given(st.integers(2, 6), st.integers(0, 5), st.integers(0, 1000))
def test_the_order_of_the_targets_does_not_matter(num_queries: int, num_negatives: int, seed: int) -> None:
    queries, targets = unit(num_queries, 4, seed), unit(num_queries + num_negatives, 4, seed + 1)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    place = torch.argsort(order)
    index = torch.arange(num_queries)
    torch.testing.assert_close(
        info_nce(queries, targets, index), info_nce(queries, targets[order], place[index]), rtol=1e-4, atol=1e-5
    )


def test_a_target_equal_to_the_positive_is_no_negative() -> None:
    queries, targets = unit(3, 8, 0), unit(3, 8, 1)
    doubled = torch.cat([targets, targets[:1]])
    keys = torch.tensor([5, 6, 7, 5])
    masked = info_nce(queries, doubled, torch.arange(3), 0.1, equal_target_mask(keys, torch.arange(3)))
    alone = F.cross_entropy(queries[:1] @ targets.T / 0.1, torch.tensor([0]))
    others = F.cross_entropy(queries[1:] @ doubled.T / 0.1, torch.tensor([1, 2]))
    torch.testing.assert_close(masked, (alone + 2 * others) / 3)
    assert masked != info_nce(queries, doubled, torch.arange(3), 0.1)
