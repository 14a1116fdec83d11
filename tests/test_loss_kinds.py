"""Every loss and label compared with its closed form on the whole matrix: value and gradient, in blocks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlm2vec.losses import NO_QUERY, Exclusions, Labels, Reference, contrastive_loss

T = 0.2
Plain = Callable[[torch.Tensor], torch.Tensor]


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


# Query 0 has positives 0 and 4, query 1 has 1, query 2 has 2, 5 and 6, query 3 has 3; targets 7 to 9 are negatives that
# came with queries 0, 1 and 3.
POSITIVE = torch.tensor([0, 1, 2, 3, 0, 2, 2, NO_QUERY, NO_QUERY, NO_QUERY])
GIVEN = torch.tensor([0, 1, 2, 3, 0, 2, 2, 0, 1, 3])
IS_POSITIVE = torch.arange(4)[:, None] == POSITIVE
IS_OWN = torch.arange(4)[:, None] == GIVEN
SCORES = torch.tensor([3.0, 1.0, torch.nan, 2.0, 0.5, torch.nan, torch.nan, -1.0, 0.7, torch.nan])
OTHER = Reference(unit(4, 6, 7), unit(10, 6, 8))
OTHER_COSINES = OTHER.queries_BE @ OTHER.targets_ME.T


def info_nce(cosines: torch.Tensor, excluded: torch.Tensor | None = None) -> torch.Tensor:
    logits = (cosines / T).masked_fill(torch.zeros_like(IS_POSITIVE) if excluded is None else excluded, -torch.inf)
    rows = []
    for row, positives in zip(logits, IS_POSITIVE, strict=True):
        each = [F.log_softmax(torch.cat([own[None], row[~positives]]), dim=0)[0] for own in row[positives]]
        rows.append(-torch.stack(each).mean())
    return torch.stack(rows).mean()


def supcon(cosines: torch.Tensor) -> torch.Tensor:
    log_p = F.log_softmax(cosines / T, dim=1)
    return -torch.stack([row[own].mean() for row, own in zip(log_p, IS_POSITIVE, strict=True)]).mean()


def mil_nce(cosines: torch.Tensor) -> torch.Tensor:
    return -(F.softmax(cosines / T, dim=1) * IS_POSITIVE).sum(dim=1).log().mean()


def sigmoid(cosines: torch.Tensor) -> torch.Tensor:
    return -F.logsigmoid(torch.where(IS_POSITIVE, 1, -1) * cosines / T).sum(dim=1).mean()


def soft_labels(cosines: torch.Tensor) -> torch.Tensor:
    rows = []
    for row, own in zip(cosines / T, IS_OWN & ~SCORES.isnan(), strict=True):
        wanted = F.softmax(SCORES[own], dim=0)
        rows.append((wanted * (wanted.log() - F.log_softmax(row[own], dim=0))).sum())
    return torch.stack(rows).mean()


def distillation(cosines: torch.Tensor) -> torch.Tensor:
    wanted = F.softmax(OTHER_COSINES / 0.5, dim=1)
    return (wanted * (wanted.log() - F.log_softmax(cosines / T, dim=1))).sum(dim=1).mean()


def guided(cosines: torch.Tensor) -> torch.Tensor:
    least = OTHER_COSINES.masked_fill(~IS_POSITIVE, 9).amin(dim=1, keepdim=True)
    excluded = (least + 0.1 < OTHER_COSINES) & ~IS_POSITIVE
    assert excluded.any()
    return info_nce(cosines, excluded)


def hard(cosines: torch.Tensor, weighted: torch.Tensor) -> torch.Tensor:
    return info_nce(cosines + T * 9 * cosines.detach() * weighted)


CASES: dict[str, tuple[str, dict[str, Any], Plain]] = {
    "info_nce": ("info_nce", {}, info_nce),
    "supcon": ("supcon", {}, supcon),
    "mil_nce": ("mil_nce", {}, mil_nce),
    "sigmoid": ("sigmoid", {}, sigmoid),
    "soft_labels": ("soft_labels", {"scores_M": SCORES}, soft_labels),
    "distillation": ("distillation", {"teacher": OTHER, "teacher_temperature": 0.5}, distillation),
    "guide": ("info_nce", {"exclusions": Exclusions(guide=OTHER, guide_margin=0.1)}, guided),
    "hard all": ("info_nce", {"hardness_alpha": 9.0}, lambda cosines: hard(cosines, ~IS_POSITIVE)),
    "hard in batch": (
        "info_nce",
        {"hardness_alpha": 9.0, "hardness_mode": "in_batch_negatives"},
        lambda cosines: hard(cosines, ~IS_OWN),
    ),
    "hard own": (
        "info_nce",
        {"hardness_alpha": 9.0, "hardness_mode": "hard_negatives"},
        lambda cosines: hard(cosines, IS_OWN & ~IS_POSITIVE),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block_logits", [10, 1000])
def test_value_and_gradient_are_those_of_the_closed_form(name: str, block_logits: int) -> None:
    kind, about, plain = CASES[name]
    labels = Labels(torch.arange(4), POSITIVE, GIVEN, **about)
    found = []
    for in_blocks in (True, False):
        queries, targets = unit(4, 8, 0).requires_grad_(), unit(10, 8, 1).requires_grad_()
        if in_blocks:
            value = contrastive_loss(queries, targets, labels, {kind: 1.0}, T, block_logits=block_logits)
        else:
            value = plain(queries @ targets.T)
        value.backward()
        found.append([value.detach(), queries.grad, targets.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert found[0][0] > 0.01


def test_hardness_of_zero_is_the_plain_loss_bit_for_bit() -> None:
    vectors = unit(4, 8, 0), unit(10, 8, 1)
    plain, zero = (
        contrastive_loss(*vectors, Labels(torch.arange(4), POSITIVE, GIVEN, **about), {"info_nce": 1.0}, T)
        for about in ({}, {"hardness_alpha": 0.0, "hardness_mode": "hard_negatives"})
    )
    assert torch.equal(plain, zero)


@pytest.mark.parametrize("mode", ["in_batch_negatives", "hard_negatives", "all_negatives"])
def test_hardness_is_that_of_sentence_transformers(mode: str) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    queries, targets = unit(4, 8, 0), unit(8, 8, 1)  # one positive, then one hard negative per query
    theirs = MultipleNegativesRankingLoss(
        SimpleNamespace(), scale=1 / T, hardness_mode=mode, hardness_strength=9.0
    ).compute_loss_from_embeddings([queries, targets[:4], targets[4:]], torch.empty(0))
    given = torch.arange(4).repeat(2)
    positive = torch.where(torch.arange(8) < 4, given, NO_QUERY)
    labels = Labels(torch.arange(4), positive, given, hardness_alpha=9.0, hardness_mode=mode)
    torch.testing.assert_close(contrastive_loss(queries, targets, labels, {"info_nce": 1.0}, T), theirs)


def test_a_sum_of_losses_is_weighted() -> None:
    vectors = unit(4, 8, 0), unit(10, 8, 1)
    labels = Labels(torch.arange(4), POSITIVE, GIVEN, scores_M=SCORES)
    both = contrastive_loss(*vectors, labels, {"mil_nce": 1.0, "soft_labels": 0.3}, T)
    parts = [contrastive_loss(*vectors, labels, {name: 1.0}, T) for name in ("mil_nce", "soft_labels")]
    torch.testing.assert_close(both, parts[0] + 0.3 * parts[1])


def test_a_query_whose_negatives_are_all_masked_has_loss_and_gradient_zero() -> None:
    queries = unit(2, 8, 0).requires_grad_()
    labels = Labels.one_positive(torch.arange(2), 2, Exclusions([(torch.zeros(2), torch.zeros(2))]))
    for name in ("info_nce", "supcon", "mil_nce"):
        value = contrastive_loss(queries, unit(2, 8, 1), labels, {name: 1.0}, T)
        (gradient,) = torch.autograd.grad(value, queries)
        assert value == 0 and not gradient.any()
