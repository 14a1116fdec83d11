"""Frozen weights in 8 or 4 bits: their errors are bounded, and gradients are those of the expanded weights."""

from __future__ import annotations

import copy
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gradcache import assert_equal, batch_of, gradients, plain, whole
from test_tuning import recipe
from torch import nn

from vlm2vec import Embedder
from vlm2vec.models.verification.golden import verify_golden
from vlm2vec.planning.cost import WEIGHT_BYTES
from vlm2vec.training.config import Recipe
from vlm2vec.training.quantized_base import Bits, QuantizedLinear, nf4_codes, quantize_base
from vlm2vec.training.run import build_embedder, read_log, train

KINDS: tuple[Bits, ...] = get_args(Bits)
PUBLISHED = (-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0)
PUBLISHED += (0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0)


def test_the_codes_of_nf4_are_the_published_ones() -> None:
    torch.testing.assert_close(nf4_codes(), torch.tensor(PUBLISHED), rtol=0, atol=1e-6)


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 150), st.floats(1e-4, 1e3), st.sampled_from(KINDS))
def test_an_expanded_weight_differs_by_at_most_half_a_step(rows: int, columns: int, size: float, bits: Bits) -> None:
    layer = nn.Linear(columns, rows)
    nn.init.normal_(layer.weight, std=size)
    weight = layer.weight.detach()
    error = (QuantizedLinear(layer, bits).weight - weight).abs()
    if bits == "int8":
        bound = weight.abs().amax(dim=1, keepdim=True) / 254
    else:
        flat = nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % 64)).view(-1, 64)
        step = nf4_codes().diff().max() / 2
        bound = (flat.abs().amax(dim=1, keepdim=True) * step).expand_as(flat).reshape(-1)[: weight.numel()]
        bound = bound.view_as(weight)
    assert (error <= bound * 1.001 + 1e-9).all()


@pytest.mark.parametrize("bits", KINDS)
def test_bytes_of_a_weight_are_those_of_the_plan_and_autograd_keeps_no_expanded_weight(bits: Bits) -> None:
    layer = QuantizedLinear(nn.Linear(1024, 512, bias=False), bits)
    held = sum(buffer.nbytes for name, buffer in layer.named_buffers() if name != "pairs")
    assert held / (1024 * 512) == pytest.approx(WEIGHT_BYTES[bits], rel=0.01)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
        layer(torch.ones(1, 1024, requires_grad=True)).sum()
    assert sum(kept) < 1024 * 512


@pytest.mark.parametrize("bits", KINDS)
def test_gradients_of_adapters_are_those_over_the_expanded_weights(bits: Bits, tiny_qwen2_vl: str) -> None:
    found = []
    for expands in (False, True):
        embedder = build_embedder(
            recipe(tiny_qwen2_vl, model={"quantize": bits}, lora={"dropout": 0.0, "rank": 4})
        ).train()
        generator = torch.Generator().manual_seed(2)
        for name, parameter in sorted(embedder.named_parameters()):
            if "lora_B" in name:
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        for parent in list(embedder.modules()):
            for name, module in list(parent.named_children()) if expands else ():
                if isinstance(module, QuantizedLinear):
                    same = nn.Linear(module.in_features, module.out_features, module.bias is not None)
                    same.weight.data = module.weight
                    same.bias = copy.copy(module.bias)
                    setattr(parent, name, same.requires_grad_(False))
        batch = batch_of(embedder)
        _, gradient = gradients(embedder, lambda e=embedder, b=batch: plain(e, b, whole(b)))
        found.append({name: value for name, value in gradient.items() if "lora" in name})
        layers = [module for module in embedder.modules() if isinstance(module, QuantizedLinear)]
        assert bool(layers) != expands
    assert found[0] and max(float(value.abs().max()) for value in found[0].values()) > 0
    assert_equal(*found)


def test_the_vision_encoder_keeps_its_precision(tiny_vlm: Any) -> None:
    embedder = Embedder.from_pretrained(tiny_vlm("llava_next"), dtype=torch.float32)
    quantize_base(embedder.backbone, "nf4")
    quantized = [name for name, module in embedder.named_modules() if isinstance(module, QuantizedLinear)]
    assert quantized and all("language_model" in name for name in quantized)


@pytest.mark.parametrize("bf16", [True, False])
def test_a_run_on_a_4_bit_base_learns_and_its_golden_vectors_are_those_of_the_saved_model(
    bf16: bool, tiny_qwen2_vl: str, recipe_values: dict[str, Any]
) -> None:
    values = {
        **recipe_values,
        "model": {"base": tiny_qwen2_vl, "quantize": "nf4"},
        "lora": {"rank": 4, "dropout": 0.0},
        "train": {**recipe_values["train"], "steps": 12, "learning_rate": 5e-3, "bf16": bf16},
    }
    run = train(Recipe.model_validate(values))
    losses = [entry["loss"] for entry in read_log(run)]
    assert np.mean(losses[-3:]) < losses[0]
    embedder = Embedder.from_pretrained(run, dtype=torch.bfloat16 if bf16 else torch.float32)
    assert not any(isinstance(module, QuantizedLinear) for module in embedder.modules())
    assert verify_golden(embedder, run).min() > 0.9999


def test_quantizing_needs_frozen_weights() -> None:
    for changes in ({"lora": None}, {"train": {"steps": 2, "sharding": "full"}}):
        with pytest.raises(ValueError, match=r"model\.quantize needs lora and train\.sharding none"):
            recipe("compact", model={"quantize": "int8"}, **changes)
