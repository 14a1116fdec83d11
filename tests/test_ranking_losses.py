"""Losses of rerankers equal their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vlm2vec.losses.ranking import listwise, pointwise

LOGITS = torch.tensor([1.5, -0.5, 0.25, 2.0, 0.5, -1.0])
POSITIVE = torch.tensor([True, False, False, True, False, False])


def test_the_pointwise_loss_is_the_binary_cross_entropy() -> None:
    counts = torch.tensor([3, 3])
    expected = F.binary_cross_entropy_with_logits(LOGITS, POSITIVE.float())
    torch.testing.assert_close(pointwise(LOGITS, POSITIVE, counts).mean(), expected)


def test_the_listwise_loss_is_the_cross_entropy_of_the_positive() -> None:
    counts = torch.tensor([3, 3])
    expected = F.cross_entropy(LOGITS.view(2, 3), torch.tensor([0, 0]), reduction="none")
    torch.testing.assert_close(listwise(LOGITS, POSITIVE, counts), expected)


def test_queries_may_have_different_numbers_of_candidates_and_of_positives() -> None:
    positive = torch.tensor([True, False, True, True, False, False])
    counts = torch.tensor([2, 4])
    negatives = math.log(math.exp(0.5) + math.exp(-1.0))

    def term(logit: float) -> float:
        return math.log(math.exp(logit) + math.exp(negatives)) - logit

    expected = [math.log1p(math.exp(-2.0)), (term(0.25) + term(2.0)) / 2]
    torch.testing.assert_close(listwise(LOGITS, positive, counts), torch.tensor(expected))
    probabilities = [torch.sigmoid(LOGITS[k] if positive[k] else -LOGITS[k]) for k in range(6)]
    nats = [-math.log(value) for value in probabilities]
    expected = [sum(nats[:2]) / 2, sum(nats[2:]) / 4]
    torch.testing.assert_close(pointwise(LOGITS, positive, counts), torch.tensor(expected))


@pytest.mark.parametrize("loss", [pointwise, listwise])
def test_gradients_are_finite_also_where_a_query_has_no_negative(loss: object) -> None:
    logits = LOGITS.clone().requires_grad_()
    assert callable(loss)
    loss(logits, torch.tensor([True, True, False, False, True, False]), torch.tensor([2, 4])).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
