"""Work and memory of a training step: frozen weights, a frozen encoder and DoRA norms are computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_gradcache import batch_of, gradients, loss
from test_tuning import recipe

from vlm2vec import Embedder
from vlm2vec.batch import cut_by_tokens
from vlm2vec.models.checkpoints.folder import add_adapter
from vlm2vec.models.vision.frozen_vision import FrozenVision
from vlm2vec.training.dora import norms_once
from vlm2vec.training.frozen_weights import FrozenCopies
from vlm2vec.training.gradcache import cached_backward
from vlm2vec.training.run import build_embedder

Gradients = dict[str, torch.Tensor]


def step(embedder: Embedder, half: bool = False, vision: FrozenVision | None = None) -> tuple[float, Gradients]:
    batch = batch_of(embedder)
    chunks = cut_by_tokens(batch.lengths(), 4, None)

    def encode(part: object) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            vectors: torch.Tensor = embedder(part)
        return vectors

    around: dict[str, Any] = {"around": vision.serving} if vision else {}
    return gradients(embedder, lambda: cached_backward(encode, batch, loss, chunks, 1, **around))


def test_frozen_weights_are_held_once_in_bfloat16_and_trained_ones_in_float32(tiny_qwen2_vl: str) -> None:
    lora = {"dropout": 0.0}
    embedder = build_embedder(recipe(tiny_qwen2_vl, lora=lora, train={"steps": 2, "bf16": True}))
    named = dict(embedder.named_parameters())
    assert {p.dtype for p in named.values() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in named.values() if not p.requires_grad} == {torch.bfloat16}
    assert FrozenCopies(embedder, torch.bfloat16).copies == []
    in_float32 = build_embedder(recipe(tiny_qwen2_vl, lora=lora, train={"steps": 2, "bf16": False}))
    assert {p.dtype for p in in_float32.parameters()} == {torch.float32}


def test_a_bfloat16_base_trains_as_copies_of_a_float32_base_did(tiny_qwen2_vl: str) -> None:
    values, found = [], []
    for half in (True, False):
        embedder = build_embedder(
            recipe(tiny_qwen2_vl, lora={"dropout": 0.0}, train={"steps": 2, "bf16": half})
        ).train()
        generator = torch.Generator().manual_seed(2)
        for name, parameter in embedder.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        with FrozenCopies(embedder, torch.bfloat16).in_place():
            value, gradient = step(embedder, half=True)
        values.append(value)
        found.append(torch.cat([gradient[name].flatten() for name in sorted(gradient)]))
    assert values[0] == pytest.approx(values[1], rel=0.02)
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.98


def test_full_tuning_keeps_all_weights_in_float32(tiny_qwen2_vl: str) -> None:
    embedder = build_embedder(recipe(tiny_qwen2_vl, lora=None, train={"steps": 2, "bf16": True}))
    assert {p.dtype for p in embedder.parameters()} == {torch.float32}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_encoder_runs_once_for_each_mini_batch_with_images(tiny_qwen2_vl: str, checkpointing: bool) -> None:
    model = {"gradient_checkpointing": checkpointing}
    embedder = build_embedder(recipe(tiny_qwen2_vl, lora={"dropout": 0.0}, model=model)).train()
    passes: list[bool] = []
    blocks = next(module for name, module in embedder.named_modules() if name.endswith("visual.blocks"))
    blocks[0].register_forward_hook(lambda module, inputs, output: passes.append(output.requires_grad))
    layers: list[bool] = []
    embedder.backbone.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: layers.append(True))
    batch = batch_of(embedder)
    chunks = cut_by_tokens(batch.lengths(), 4, None)
    with_images = sum(
        "pixel_values" in (part := batch.select(rows)).tensors and len(part["pixel_values"]) > 0 for rows in chunks
    )
    step(embedder, vision=FrozenVision(embedder.backbone.model))
    assert passes == [False] * with_images
    # Two forward passes of every mini-batch but the kept one; recomputing adds a pass to each backward pass.
    assert len(layers) == 2 * len(chunks) - 1 + (len(chunks) if checkpointing else 0)


def test_doras_norm_is_computed_once_a_step_with_the_same_gradient_to_the_bit(
    tiny_qwen2_vl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    embedder = Embedder.from_pretrained(tiny_qwen2_vl, dtype=torch.float32)
    add_adapter(embedder.backbone, 4, 8, 0.1, None, dora=True)
    for name, parameter in embedder.train().named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    norm, counted = torch.linalg.norm, []
    monkeypatch.setattr(torch.linalg, "norm", lambda *args, **kwargs: (counted.append(1), norm(*args, **kwargs))[1])
    expected, plain = step(embedder)
    every_time = len(counted)
    counted.clear()
    with norms_once(embedder):
        value, found = step(embedder)
    assert len(counted) == sum("magnitude" in name for name in found) < every_time
    assert value == expected and found.keys() == plain.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())
    step(embedder)
    assert len(counted) > every_time, "the layers are their own again after the step"


def test_phi3_v_reuses_its_frozen_encoder() -> None:
    embedder = Embedder.from_pretrained(Path(__file__).parents[1] / "golden/phi3v", dtype=torch.float32)
    add_adapter(embedder.backbone, 4, 8, 0.0, None)
    for name, parameter in embedder.train().named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    expected, plain = step(embedder)
    vision = FrozenVision(embedder.backbone.model)
    value, found = step(embedder, vision=vision)
    batch = batch_of(embedder)
    assert 0 < vision.num_runs <= len(cut_by_tokens(batch.lengths(), 4, None)) and vision.frozen
    assert value == expected
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())
