"""Merged checkpoints: the weights equal the formula of the mean; incompatible models give a one-line error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm2vec import Embedder, EmbeddingInput, UserError
from vlm2vec.cli import run
from vlm2vec.models.checkpoints.folder import add_adapter, merge_adapter
from vlm2vec.models.checkpoints.merging import linear, merge, parse_run, spherical

Weights = dict[str, torch.Tensor]
INPUTS = [EmbeddingInput(text="a red square"), EmbeddingInput(text="blue")]


@pytest.fixture(scope="module")
def runs(tiny_vlm: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three models of one base: two with adapters, one with all weights."""
    root = tmp_path_factory.mktemp("runs")
    for number in range(3):
        embedder = Embedder.from_pretrained(tiny_vlm("qwen2_vl"), dtype=torch.float32)
        if number < 2:
            add_adapter(embedder.backbone, 2, 4, 0.0, None)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in embedder.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        embedder.save_pretrained(root / str(number))
    return [str(root / str(number)) for number in range(3)]


def weights(folder: str | Path) -> Weights:
    backbone = Embedder.from_pretrained(folder, dtype=torch.float32).backbone
    merge_adapter(backbone)
    return {name: value.clone() for name, value in backbone.model.state_dict().items() if value.is_floating_point()}


def test_linear_is_the_weighted_mean_and_gives_the_vectors_of_those_weights(runs: list[str], tmp_path: Path) -> None:
    assert run(["merge", f"{runs[0]}=1", f"{runs[1]}=2", f"{runs[2]}=5", "-o", str(tmp_path / "merged")]) == 0
    a, b, c = map(weights, runs)
    wanted = {name: (a[name] + 2 * b[name] + 5 * c[name]) / 8 for name in a}
    found = weights(tmp_path / "merged")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    by_hand = Embedder.from_pretrained(runs[2], dtype=torch.float32)
    by_hand.backbone.model.load_state_dict(wanted, strict=False)
    merged = Embedder.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(merged.encode(INPUTS), by_hand.encode(INPUTS), atol=1e-5)
    about = json.loads((tmp_path / "merged/merge.json").read_text())
    assert [entry["weight"] for entry in about["runs"]] == [1, 2, 5] and about["method"] == "linear"


def test_a_model_merged_with_itself_is_itself(runs: list[str], tmp_path: Path) -> None:
    for method in ("linear", "spherical"):
        found = weights(merge([(runs[0], 1.0), (runs[0], 3.0)], tmp_path / method, method))
        for name, value in weights(runs[0]).items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_spherical_follows_the_arc() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    for share in (0.0, 0.25, 0.5, 1.0):
        angle = share * math.pi / 2
        wanted = 2 * torch.tensor([math.cos(angle), math.sin(angle)])
        torch.testing.assert_close(spherical(a, b, share), wanted, rtol=1e-6, atol=1e-6)
    for b in (a * (1 + 1e-6), -a, torch.zeros(2)):  # no arc, or no single one
        torch.testing.assert_close(spherical(a, b, 0.3), linear(a, b, 0.3))


def test_weights_are_read_from_the_name() -> None:
    assert parse_run("runs/a") == ("runs/a", 1.0)
    assert parse_run("runs/lr=3/a=0.5") == ("runs/lr=3/a", 0.5)
    for text in ("runs/a=x", "runs/a=0", "runs/a=-1", "runs/a=nan"):
        with pytest.raises(UserError, match=r"expected a positive number, such as runs/a=0\.5"):
            parse_run(text)


def test_what_cannot_be_merged_is_one_line(runs: list[str], tmp_path: Path) -> None:
    other = Embedder.from_pretrained(runs[0], dtype=torch.float32)
    other.backbone.pooling = "mean"
    other.save_pretrained(tmp_path / "mean")
    cases = [
        ([(runs[0], 1.0)], "linear", "found 1 run; expected at least two"),
        ([(runs[0], 1.0), (runs[1], 1.0)], "cubic", "method 'cubic': expected one of linear, spherical"),
        ([(runs[0], 1.0), (str(tmp_path / "mean"), 1.0)], "linear", "pooling is 'mean', expected 'last'"),
    ]
    for several, method, message in cases:
        with pytest.raises(UserError, match=message):
            merge(several, tmp_path / "out", method)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="already exists"):
        merge([(runs[0], 1.0), (runs[1], 1.0)], tmp_path / "mean")
