from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from test_gradcache import assert_equal, batch_of, build, gradients, plain, whole
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.training import step
from vlm2vec.training.attention import SHORT, attention_for, use_kernel
from vlm2vec.training.config import Recipe
from vlm2vec.training.run import build_embedder, train

CPU = torch.device("cpu")


def way(length: int, device: torch.device = CPU, half: bool = True) -> str:
    """The node that attention leaves in the graph."""
    states = torch.randn(2, 3, length, 8, requires_grad=True)
    batch = Batch({"attention_mask": torch.ones(2, length, dtype=torch.long)})
    with torch.autocast("cpu", torch.bfloat16, enabled=half), attention_for(batch, device, half):
        found = torch.nn.functional.scaled_dot_product_attention(states, states, states, is_causal=True)
    return str(found.grad_fn)


def test_short_rows_take_plain_products_in_bfloat16_on_a_processor_and_nothing_else_does() -> None:
    assert "FlashAttention" not in way(SHORT)
    assert "FlashAttention" in way(SHORT + 1)
    assert "FlashAttention" in way(SHORT, half=False)
    assert "FlashAttention" in way(SHORT, torch.device("cuda"))


@pytest.mark.parametrize("family", ["compact", "qwen2_vl"])
def test_the_gradient_is_that_of_float32_as_nearly_as_the_fused_kernels(family: str, tiny_qwen2_vl: str) -> None:
    options = {"num_layers": 2, "visual_tokens": 4, "image_size": 64} if family == "compact" else {}
    embedder = build("compact" if family == "compact" else tiny_qwen2_vl, 0.0, **options)
    batch = batch_of(embedder)

    def error(backend: SDPBackend, exact: dict[str, torch.Tensor]) -> float:
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(backend):
            _, found = gradients(embedder, lambda: plain(embedder, batch, whole(batch)))
        assert found.keys() == exact.keys()
        squares = [(found[name] - exact[name]).square().sum() / exact[name].square().sum() for name in exact]
        return float(torch.stack(squares).mean().sqrt())

    errors = []
    for seed in range(4):  # one draw of weights alone may favour either way by a quarter
        torch.manual_seed(seed)
        for name, parameter in embedder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        _, exact = gradients(embedder, lambda: plain(embedder, batch, whole(batch)))
        errors.append([error(backend, exact) for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)])
    by_products, by_kernel = torch.tensor(errors).mean(dim=0).tolist()
    assert 0 < by_products < 1.15 * by_kernel
    assert by_products < 0.1


def test_a_run_in_bfloat16_asks_for_it(recipe_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def remember(batch: Batch, device: torch.device, in_half: bool) -> AbstractContextManager[object]:
        asked.append(in_half)
        return attention_for(batch, device, in_half)

    monkeypatch.setattr(step, "attention_for", remember)
    for half in (True, False):
        values = {**recipe_values, "train": {**recipe_values["train"], "bf16": half, "steps": 2}}
        train(Recipe.model_validate({**values, "output": f"{recipe_values['output']}-{half}"}))
    assert asked[0] is True and asked[-1] is False


def test_activations_that_are_computed_again_take_the_same_way(
    recipe_values: dict[str, Any], tiny_qwen2_vl: str
) -> None:
    model = {"base": tiny_qwen2_vl, "gradient_checkpointing": True}
    values = {"model": model, "train": {**recipe_values["train"], "bf16": True, "steps": 2}}
    train(Recipe.model_validate({**recipe_values, **values}))


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_each_kernel_that_runs_on_a_cpu_has_the_gradient_of_the_default(family: str, tiny_vlm: Any) -> None:
    found = {}
    for kernel in ("auto", "sdpa", "eager"):
        embedder = build(str(tiny_vlm(family)), 0.0)
        use_kernel(embedder.backbone, kernel)
        batch = batch_of(embedder)
        value, found[kernel] = gradients(embedder, lambda e=embedder, b=batch: plain(e, b, whole(b)))
        assert np.isfinite(value)
    assert_equal(found["auto"], found["sdpa"])
    assert_equal(found["auto"], found["eager"])
    assert any(not torch.equal(found["auto"][name], found["eager"][name]) for name in found["auto"]), "one kernel ran"


def test_a_kernel_that_cannot_run_here_is_named_before_anything_is_loaded(tmp_path: Any) -> None:
    values = {"data": {"root": tmp_path}, "train": {"steps": 1}, "output": tmp_path / "run"}
    recipe = Recipe.model_validate({**values, "model": {"base": "nowhere", "attention_kernel": "flash_attention_2"}})
    with pytest.raises(UserError, match="flash_attention_2 requires a GPU; choose auto on cpu"):
        build_embedder(recipe)
    with pytest.raises(UserError, match="compact has only one implementation"):
        use_kernel(build("compact", 0.0, num_layers=1, visual_tokens=4, image_size=64).backbone, "eager")
