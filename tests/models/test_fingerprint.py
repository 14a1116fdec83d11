"""What counts as another model: every part of the description, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny.fixtures import tiny_vlm  # noqa: F401

from vlm2vec import Embedder
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.verification.fingerprint import describe


@pytest.fixture(scope="module")
def folder(tiny_vlm) -> str:  # noqa: F811
    return str(tiny_vlm("qwen2_vl"))


def load(folder: str, **settings: object) -> Embedder:
    return Embedder.from_pretrained(folder, dtype=torch.float32, **settings)


def changed(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one if one[name] != other[name]}


def test_loading_again_gives_the_same_description(folder: str) -> None:
    assert describe(load(folder), "m") == describe(load(folder), "m")


def test_every_part_that_decides_vectors_changes_its_own_entry(folder: str) -> None:
    plain = describe(load(folder), "m")
    weights = load(folder)
    with torch.no_grad():
        next(weights.parameters()).view(-1)[0] += 1e-3
    assert changed(plain, describe(weights, "m")) == {"weights"}
    template = load(folder)
    template.backbone.template = replace(template.backbone.template, separator=": ")
    assert changed(plain, describe(template, "m")) == {"template"}
    assert changed(plain, describe(load(folder, max_pixels=28 * 28 * 8), "m")) == {"processor", "resolution"}
    narrow = Embedder.from_pretrained(folder, dtype=torch.bfloat16)
    assert changed(plain, describe(narrow, "m")) == {"weights", "precision"}
    pooled = load(folder)
    pooled.backbone.pooling = "mean"
    assert changed(plain, describe(pooled, "m")) == {"pooling"}


def test_an_adapter_is_told_from_the_base(folder: str) -> None:
    torch.manual_seed(0)
    first, second = load(folder), load(folder)
    for embedder in (first, second):
        checkpoint.add_adapter(embedder.backbone, 2, 4, 0.0, None)
    assert "adapter" in changed(describe(first, "m"), describe(second, "m"))
    assert describe(load(folder), "m")["adapter"] == "none"
