from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm2vec.losses import Exclusions, Labels, contrastive_loss, info_nce, matryoshka


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
    masked = info_nce(queries, doubled, torch.arange(3), 0.1, Exclusions([(keys[:3], keys)]))
    alone = F.cross_entropy(queries[:1] @ targets.T / 0.1, torch.tensor([0]))
    others = F.cross_entropy(queries[1:] @ doubled.T / 0.1, torch.tensor([1, 2]))
    torch.testing.assert_close(masked, (alone + 2 * others) / 3)
    assert masked != info_nce(queries, doubled, torch.arange(3), 0.1)


def test_a_target_much_nearer_than_the_positive_is_left_out() -> None:
    queries = torch.tensor([[1.0, 0.0]])
    targets = F.normalize(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), dim=-1)
    index = torch.tensor([0])
    masked = info_nce(queries, targets, index, 0.1, Exclusions(margin=0.2))
    torch.testing.assert_close(masked, info_nce(queries, targets[[0, 2]], index, 0.1))
    torch.testing.assert_close(
        info_nce(queries, targets, index, 0.1, Exclusions(margin=0.3)), info_nce(queries, targets, index, 0.1)
    )


def plain_info_nce(
    queries: torch.Tensor, targets: torch.Tensor, index: torch.Tensor, temperature: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return F.cross_entropy(queries @ targets.T / temperature, index)


def plain_sigmoid(
    queries: torch.Tensor, targets: torch.Tensor, index: torch.Tensor, temperature: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    sign = 2 * F.one_hot(index, len(targets)) - 1
    return -F.logsigmoid(sign * (queries @ targets.T / temperature + bias)).sum(dim=1).mean()


def in_blocks_info_nce(*args: torch.Tensor) -> torch.Tensor:
    return info_nce(*args[:4], block_logits=10)


def in_blocks_sigmoid(*args: torch.Tensor) -> torch.Tensor:
    queries, targets, index, *scalars = args
    return contrastive_loss(queries, targets, Labels.one_positive(index, len(targets)), {"sigmoid": 1.0}, *scalars, 10)


@pytest.mark.parametrize(
    ("in_blocks", "plain"), [(in_blocks_info_nce, plain_info_nce), (in_blocks_sigmoid, plain_sigmoid)]
)
def test_value_and_every_gradient_in_blocks_equal_those_of_the_whole_matrix(
    in_blocks: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor]
) -> None:
    found = []
    for loss in (in_blocks, plain):
        queries, targets = unit(7, 8, 0).requires_grad_(), unit(9, 8, 1).requires_grad_()
        temperature, bias = torch.tensor(0.3, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
        value = loss(queries, targets, torch.arange(7) + 1, temperature, bias)
        (2 * value).backward()
        found.append([value, queries.grad, targets.grad, temperature.grad, bias.grad])
    for one, other in zip(*found, strict=True):
        if other is not None:  # InfoNCE has no bias
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_the_gradient_is_right_where_targets_are_left_out() -> None:
    queries, targets = unit(5, 8, 0), unit(8, 8, 1)
    keys = torch.tensor([3, 4, 3, 5, 6, 3, 4, 9])
    rule = Exclusions([(keys[:5], keys)])

    def of(queries: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return info_nce(queries, targets, torch.arange(5), 0.3, rule, block_logits=17)

    inputs = (queries.double().requires_grad_(), targets.double().requires_grad_())
    assert torch.autograd.gradcheck(of, inputs, eps=1e-3, atol=1e-3, rtol=1e-2)


def test_memory_grows_with_the_batch_and_not_with_its_square() -> None:
    rows, dim = 4096, 16
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    queries, targets = unit(rows, dim, 0).requires_grad_(), unit(rows, dim, 1).requires_grad_()
    with Watch():
        info_nce(queries, targets, torch.arange(rows), block_logits=2**16).backward()
    assert rows * dim <= largest <= 2**17 < rows * rows


def test_matryoshka_is_the_mean_over_cut_and_renormalised_vectors() -> None:
    queries, targets, index = unit(4, 8, 0), unit(6, 8, 1), torch.arange(4)

    def loss(q: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return info_nce(q, t, index, 0.1)

    short = loss(F.normalize(queries[:, :3], dim=-1), F.normalize(targets[:, :3], dim=-1))
    torch.testing.assert_close(matryoshka(loss, queries, targets, [3, 8]), (short + loss(queries, targets)) / 2)
