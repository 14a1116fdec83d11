from __future__ import annotations

import pytest
import torch

from vlm2vec.models.pooling import last_token, mean

HIDDEN = torch.arange(24.0).reshape(2, 4, 3)
RIGHT = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize(("mask", "last"), [(RIGHT, 1), (LEFT, 3)])
def test_the_last_token_is_the_last_real_one_wherever_the_padding_stands(mask, last):
    torch.testing.assert_close(last_token(HIDDEN, mask), torch.stack([HIDDEN[0, last], HIDDEN[1, 3]]))


def test_the_last_token_of_a_mask_with_a_gap_is_after_the_gap():
    assert torch.equal(last_token(HIDDEN[:1], torch.tensor([[1, 0, 1, 0]])), HIDDEN[:1, 2])


@pytest.mark.parametrize(("mask", "rows"), [(RIGHT, slice(0, 2)), (LEFT, slice(2, 4))])
def test_the_mean_leaves_padding_out(mask, rows):
    torch.testing.assert_close(mean(HIDDEN, mask), torch.stack([HIDDEN[0, rows].mean(0), HIDDEN[1].mean(0)]))


@pytest.mark.parametrize("pool", [last_token, mean])
def test_pooling_passes_gradients_to_real_tokens_only(pool):
    hidden = HIDDEN.clone().requires_grad_()
    pool(hidden, RIGHT).sum().backward()
    assert hidden.grad[0, 2:].abs().sum() == 0
    assert hidden.grad[0, :2].abs().sum() > 0


def test_pooling_keeps_the_dtype():
    assert last_token(HIDDEN.bfloat16(), RIGHT).dtype == mean(HIDDEN.bfloat16(), RIGHT).dtype == torch.bfloat16
