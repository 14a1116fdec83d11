from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, multiprocessing

from vlm2vec.batch import Batch
from vlm2vec.data.collate import PairBatch
from vlm2vec.losses import Exclusions, info_nce
from vlm2vec.training.loss_settings import LossSettings
from vlm2vec.training.objective import GatheredTargets, Objective

SETTINGS: list[dict[str, Any]] = [
    {},
    {"directions": "both", "learn_temperature": True},
    {"kind": "sigmoid", "learn_temperature": True, "directions": "both"},
    {"matryoshka_dims": [4, 8], "mask_margin": 0.1, "mask_equal_queries": False},
    {"hardness_alpha": 9.0, "hardness_mode": "in_batch_negatives", "directions": "both"},
    {"kind": "supcon", "also": {"soft_labels": 0.5}, "directions": "both", "learn_temperature": True},
    {"kind": "mil_nce", "hardness_alpha": 2.0, "hardness_mode": "hard_negatives"},
    {"guide": "model", "guide_margin": 0.05, "mask_equal_queries": False},
    {"also": {"distillation": 0.7}, "teacher": "model", "distill_vectors": 0.3, "teacher_temperature": 0.1},
]


def pairs_of(first: int, last: int, num_negatives: int) -> PairBatch:
    """Pairs first to last - 1 of eight whose keys repeat: every second query and every third target is equal."""
    number = last - first
    positions = torch.arange(first, last)
    negatives = torch.arange(num_negatives) + 100 + first
    targets = torch.cat([positions % 3, negatives])
    rows = torch.arange(number)
    return PairBatch(
        Batch({}), rows, torch.arange(len(targets)) + number, positions % 4, targets, targets + 50, ["row"] * number
    )


def full_pairs_of(first: int, last: int) -> PairBatch:
    """The same pairs with two further targets each four: a second positive of every fourth query, and a negative.

    Every target has a score, and a second model's vectors are there as guide and as teacher.
    """
    pairs = pairs_of(first, last, (last - first) // 2)
    number, others = last - first, (last - first) // 2
    owners = torch.arange(others) * 2  # queries 0, 2, … of this part
    pairs.target_queries = torch.cat([torch.arange(number), owners])
    pairs.is_positive = torch.cat([torch.ones(number, dtype=torch.bool), torch.arange(others) % 2 == 0])
    begin = first // 2
    pairs.scores = torch.cat([vectors(8, 5)[first:last, 0], vectors(4, 6)[begin : begin + others, 0]]) * 3
    second = torch.cat([vectors(8, 7)[first:last], vectors(8, 8)[first:last], vectors(4, 9)[begin : begin + others]])
    pairs.guide = pairs.teacher = second
    return pairs


def vectors(number: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(number, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def first_kinds(settings: dict[str, Any]) -> bool:
    """Settings that are tried on pairs of one positive without scores."""
    return SETTINGS.index(settings) < 4


def part_of_loss(first: int, last: int, settings: dict[str, Any], negatives: int = 2) -> list[torch.Tensor]:
    """The loss of these pairs and its gradients by their queries, positives, negatives and by what is learned."""
    queries, positives = vectors(8, 0)[first:last], vectors(8, 1)[first:last]
    mine = vectors(4, 2) if negatives == 4 else vectors(4, 2)[2 * (first > 0) :][:2]
    leaves = [tensor.clone().requires_grad_() for tensor in (queries, positives, mine)]
    objective = Objective(LossSettings(**settings), 0.2)
    pairs = pairs_of(first, last, negatives) if first_kinds(settings) else full_pairs_of(first, last)
    value = objective(leaves[0], torch.cat(leaves[1:]), pairs, GatheredTargets.of(pairs, torch.device("cpu")))
    value.backward()
    learned = [p.grad for p in objective.parameters() if p.grad is not None]
    return [value.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None], *learned]


def one_of_two(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = [part_of_loss(4 * rank, 4 * rank + 4, settings) for settings in SETTINGS]
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[torch.Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(one_of_two, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("which", range(len(SETTINGS)))
def test_the_parts_of_two_processes_are_the_loss_and_gradient_of_one(
    which: int, two_processes: list[list[list[torch.Tensor]]]
) -> None:
    whole = part_of_loss(0, 8, SETTINGS[which], negatives=4)
    value, *gradients = zip(*(parts[which] for parts in two_processes), strict=True)
    torch.testing.assert_close(sum(value), whole[0])
    for one, parts in zip(whole[1:4], gradients[:3], strict=True):
        torch.testing.assert_close(torch.cat(parts), one, rtol=1e-4, atol=1e-6)
    for one, parts in zip(whole[4:], gradients[3:], strict=True):  # learned scalars: summed with all gradients
        torch.testing.assert_close(sum(parts), one, rtol=1e-4, atol=1e-6)


def test_equal_targets_and_targets_of_equal_queries_are_no_negatives() -> None:
    pairs = pairs_of(0, 8, 4)
    queries, targets = vectors(8, 0), torch.cat([vectors(8, 1), vectors(4, 2)])
    columns = GatheredTargets.of(pairs, torch.device("cpu"))
    owner = torch.cat([pairs.query_keys, torch.full((4,), -1)])
    index = torch.arange(8)
    by_target = (pairs.target_keys[:8], pairs.target_keys)
    for settings, rules in (
        ({}, [by_target, (pairs.query_keys, owner)]),
        ({"mask_equal_queries": False}, [by_target]),
    ):
        found = Objective(LossSettings(**settings), 0.2)(queries, targets, pairs, columns)
        torch.testing.assert_close(found, info_nce(queries, targets, index, 0.2, Exclusions(rules)))
    bare = Objective(LossSettings(mask_equal_queries=False), 0.2, mask_equal_targets=False)
    torch.testing.assert_close(bare(queries, targets, pairs, columns), info_nce(queries, targets, index, 0.2))


def test_targets_of_one_id_are_no_negatives_though_their_content_differs() -> None:
    pairs = pairs_of(0, 4, 0)
    pairs.target_keys, pairs.query_keys = torch.arange(4), torch.arange(4)
    pairs.target_ids = torch.tensor([7, 8, 7, 9])
    queries, targets, index = vectors(4, 0), vectors(4, 1), torch.arange(4)
    found = Objective(LossSettings(), 0.2)(queries, targets, pairs, GatheredTargets.of(pairs, torch.device("cpu")))
    excluded = Exclusions([(pairs.target_ids, pairs.target_ids)])
    torch.testing.assert_close(found, info_nce(queries, targets, index, 0.2, excluded))
    assert found != info_nce(queries, targets, index, 0.2)


def test_both_directions_are_the_mean_of_each_query_and_each_target_finding_its_partner() -> None:
    pairs = pairs_of(0, 4, 0)
    queries, targets, index = vectors(4, 0), vectors(4, 1), torch.arange(4)
    settings = LossSettings(directions="both", mask_equal_queries=False)
    objective = Objective(settings, 0.2, mask_equal_targets=False)
    found = objective(queries, targets, pairs, GatheredTargets.of(pairs, torch.device("cpu")))
    there, back = info_nce(queries, targets, index, 0.2), info_nce(targets, queries, index, 0.2)
    torch.testing.assert_close(found, (there + back) / 2)


def test_a_learned_temperature_starts_where_the_recipe_says_and_is_the_only_thing_learned() -> None:
    objective = Objective(LossSettings(learn_temperature=True), 0.07)
    assert [name for name, _ in objective.named_parameters()] == ["log_temperature"]
    assert objective.log_temperature.exp().item() == pytest.approx(0.07)
    assert not Objective(LossSettings(), 0.07).learns
    assert math.isclose(Objective(LossSettings(kind="sigmoid"), 0.1).bias.item(), -10)
