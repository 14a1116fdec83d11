"""The example in docs/explain/architecture.md: a loss needs one function and one line of a table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlm2vec.losses import LOSSES, Labels, LossBlock, contrastive_loss
from vlm2vec.training.config import Recipe
from vlm2vec.training.loss_settings import LossSettings
from vlm2vec.training.run import read_log, train


def margin_rows(block: LossBlock) -> torch.Tensor:
    closest_b = block.cosines_bM.masked_fill(block.is_positive_bM | block.is_excluded_bM, -1).amax(dim=1)
    return F.relu(0.2 + closest_b - block.cosines_bM[block.is_positive_bM])


def test_a_function_and_a_line_of_the_table_train_a_model(
    recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOSSES, "margin", margin_rows)
    data = {**recipe_values["data"], "sets": ["Color"]}
    train_settings = {**recipe_values["train"], "steps": 6, "learning_rate": 1e-3}
    values = {**recipe_values, "data": data, "train": train_settings, "loss": {"kind": "margin"}}
    log = read_log(train(Recipe.model_validate(values)))
    assert 0 < log[-1]["loss"] < log[0]["loss"], [e["loss"] for e in log]


def test_its_gradient_in_blocks_is_that_of_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "margin", margin_rows)
    found = []
    for in_blocks in (True, False):
        generator = torch.Generator().manual_seed(3)
        vectors = [F.normalize(torch.randn(6, 4, generator=generator), dim=1).requires_grad_() for _ in range(2)]
        if in_blocks:
            labels = Labels.one_positive(torch.arange(6), 6)
            value = contrastive_loss(*vectors, labels, {"margin": 1.0}, block_logits=13)
        else:
            cosines = vectors[0] @ vectors[1].T
            rest = cosines - 3 * torch.eye(6)
            value = F.relu(0.2 + rest.amax(dim=1) - cosines.diagonal()).mean()
        value.backward()
        found.append([value.detach(), *(vector.grad for vector in vectors)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_recipe_with_an_unknown_loss_lists_the_table() -> None:
    with pytest.raises(ValueError, match=r"'margin' is not a loss; expected one of info_nce, supcon"):
        LossSettings(kind="margin")
