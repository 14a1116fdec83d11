from __future__ import annotations

import math
import mmap

import pytest
import torch
from torch import nn

from vlm2vec import UserError
from vlm2vec.training import guard as guards
from vlm2vec.training.config import GuardSettings
from vlm2vec.training.ema import MovingAverage
from vlm2vec.training.guard import Guard
from vlm2vec.training.step import mean_cosine
from vlm2vec.training.trainer import trackers

ROWS = [f"set.parquet, row {i}" for i in range(7)]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("loss", "finite", "what"), [(math.nan, True, "loss is nan"), (1.0, False, "gradient is not")])
def test_a_number_that_is_none_stops_the_run_with_step_and_rows(loss: float, finite: bool, what: str) -> None:
    watch = Guard(GuardSettings(), CPU)
    watch.check(6, 1.0, True, 0.1, ROWS)
    with pytest.raises(UserError, match=rf"step 7: {what}.*set.parquet, row 0; .*row 4 and 2 more"):
        watch.check(7, loss, finite, 0.1, ROWS)


def test_vectors_that_stay_alike_stop_the_run_and_a_short_spell_does_not() -> None:
    watch = Guard(GuardSettings(collapse_steps=3), CPU)
    for step, cosine in enumerate([1.0, 1.0, 0.5, 1.0, 1.0], start=1):
        watch.check(step, 1.0, True, cosine, ROWS)
    with pytest.raises(UserError, match=r"step 6: the embedding has collapsed: for 3 steps .*row 0"):
        watch.check(6, 1.0, True, 1.0, ROWS)


def test_the_mean_cosine_is_that_of_all_pairs_of_different_rows() -> None:
    vectors = nn.functional.normalize(torch.randn(6, 4), dim=-1)
    cosines = vectors @ vectors.T
    assert mean_cosine(vectors) == pytest.approx(float((cosines.sum() - 6) / 30), abs=1e-6)
    assert mean_cosine(vectors[:1].expand(5, 4)) == pytest.approx(1.0, abs=1e-5)


def test_memory_that_climbs_after_settling_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([500.0, 900.0, 950.0, 1001.0])
    monkeypatch.setattr(guards, "memory_mib", lambda device: next(held))
    watch = Guard(GuardSettings(memory_climb_mib=100, memory_settle_steps=2), CPU)
    for step in (11, 12, 13):
        watch.check(step, 1.0, True, 0.0, ROWS)
    with pytest.raises(UserError, match="step 14: memory keeps growing: 1001 MiB, 900 MiB at step 12"):
        watch.check(14, 1.0, True, 0.0, ROWS)


def test_memory_is_what_the_process_holds_now() -> None:
    before = guards.memory_mib(CPU)
    # A tensor could get pages that earlier tests freed and the process kept; a new map cannot.
    with mmap.mmap(-1, 256 * guards.MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as fresh:
        for at in range(0, len(fresh), mmap.PAGESIZE):
            fresh[at] = 1
        assert 200 < guards.memory_mib(CPU) - before < 300
    assert guards.memory_mib(CPU) - before < 50


def test_the_moving_average_follows_its_recurrence_and_leaves_frozen_weights() -> None:
    layer = nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    average = MovingAverage(layer.named_parameters(), 0.9)
    for value in (2.0, 3.0):
        with torch.no_grad():
            layer.weight.fill_(value)
        average.update()
    assert list(average.state) == ["weight"]
    average.use()
    torch.testing.assert_close(layer.weight, torch.full((1, 2), 0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3))


def test_a_tracker_that_is_unknown_or_not_installed_is_one_line() -> None:
    with pytest.raises(UserError, match=r"train\.report_to: .*nosuch"):
        trackers(["nosuch"])
    assert trackers([]) == []
