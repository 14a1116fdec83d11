from __future__ import annotations

import pytest
import torch
from torch import nn

from vlm2vec import UserError
from vlm2vec.training.config import Recipe
from vlm2vec.training.run import build_embedder


def recipe(base: str, **changes: object) -> Recipe:
    values: dict[str, object] = {"data": {"root": "."}, "train": {"steps": 2, "bf16": False}, "output": "run"}
    return Recipe.model_validate({**values, "model": {"base": base, **changes.pop("model", {})}, **changes})  # type: ignore[dict-item]


def trained(base: str, **changes: object) -> set[str]:
    return {name for name, p in build_embedder(recipe(base, **changes)).named_parameters() if p.requires_grad}


@pytest.mark.parametrize("components", ["language", "vision", "both"])
def test_adapters_stand_in_the_chosen_components_only(tiny_qwen2_vl: str, components: str) -> None:
    names = trained(tiny_qwen2_vl, model={"components": components})
    assert all("lora_" in name for name in names)
    where = {"vision" if ".visual." in name else "language" for name in names}
    assert where == ({"language", "vision"} if components == "both" else {components})


@pytest.mark.parametrize("components", ["language", "vision", None])
def test_full_tuning_leaves_the_other_component_frozen(tiny_qwen2_vl: str, components: str | None) -> None:
    names = trained(tiny_qwen2_vl, lora=None, model={"components": components})
    where = {"vision" if ".visual." in name else "language" for name in names}
    assert where == ({"language", "vision"} if components is None else {components})


def test_dora_adds_a_length_to_every_adapter(tiny_qwen2_vl: str) -> None:
    plain = trained(tiny_qwen2_vl, lora={"rank": 2})
    dora = trained(tiny_qwen2_vl, lora={"rank": 2, "dora": True})
    assert len(dora - plain) == len(plain) / 2
    assert all("magnitude" in name for name in dora - plain)


def test_components_of_a_model_that_trains_a_fixed_set_are_refused() -> None:
    small = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}
    with pytest.raises(UserError, match=r"compact always trains language model, bypass"):
        build_embedder(recipe("compact", model={"options": small, "components": "vision"}))


def test_gradient_checkpointing_gives_the_same_gradient(tiny_qwen2_vl: str) -> None:
    found = []
    for on in (False, True):
        embedder = build_embedder(recipe(tiny_qwen2_vl, lora={"dropout": 0.0}, model={"gradient_checkpointing": on}))
        for name, parameter in sorted(embedder.named_parameters()):
            if "lora_B" in name:
                torch.manual_seed(len(name))
                nn.init.normal_(parameter, std=0.05)
        batch = embedder.backbone.process([_input("some words"), _input("others")])
        embedder.train()(batch).sum(dim=0).square().sum().backward()
        found.append({n: p.grad for n, p in embedder.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6)


def _input(text: str):  # type: ignore[no-untyped-def]
    from vlm2vec import EmbeddingInput

    return EmbeddingInput(text)
