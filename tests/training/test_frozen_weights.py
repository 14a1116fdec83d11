from __future__ import annotations

import pytest
import torch
from test_gradcache import batch_of, build, gradients, loss
from torch import nn

from vlm2vec import Embedder
from vlm2vec.batch import cut_by_tokens
from vlm2vec.training.frozen_weights import FrozenCopies
from vlm2vec.training.gradcache import cached_backward


def step_gradients(embedder: Embedder) -> tuple[float, dict[str, torch.Tensor]]:
    batch = batch_of(embedder)
    chunks = cut_by_tokens(batch.lengths(), 4, None)

    def encode(part: object) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            vectors: torch.Tensor = embedder(part)
        return vectors

    return gradients(embedder, lambda: cached_backward(encode, batch, loss, chunks, 1))


@pytest.mark.parametrize("family", ["compact", "qwen2_vl"])
def test_every_gradient_is_the_same_bit_for_bit(family: str, tiny_qwen2_vl: str) -> None:
    options = {"num_layers": 2, "visual_tokens": 4, "image_size": 64} if family == "compact" else {}
    embedder = build("compact" if family == "compact" else tiny_qwen2_vl, 0.1, **options)
    expected, by_autocast = step_gradients(embedder)
    copies = FrozenCopies(embedder, torch.bfloat16)
    with copies.in_place():
        value, by_copies = step_gradients(embedder)
    assert len(copies.copies) > 10 and len(by_autocast) > 10
    assert value == expected
    assert by_copies.keys() == by_autocast.keys()
    for name, gradient in by_autocast.items():
        assert torch.equal(by_copies[name], gradient), name


def test_weights_are_back_after_a_step_and_after_one_that_failed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copies = FrozenCopies(model, torch.bfloat16)
    with pytest.raises(RuntimeError, match="stopped"), copies.in_place():
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        raise RuntimeError("stopped")
    for name, value in model.state_dict().items():
        assert value.dtype is torch.float32
        assert torch.equal(value, before[name])


def test_trained_shared_and_other_weights_stay_as_they_are() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False), "norm": nn.LayerNorm(3)})
    model["head"].weight = model["words"].weight
    model["frozen"], model["trained"] = nn.Linear(3, 3), nn.Linear(3, 3)
    model.requires_grad_(False)["trained"].requires_grad_()
    with FrozenCopies(model, torch.bfloat16).in_place():
        half = {name for name, p in model.named_parameters() if p.dtype is torch.bfloat16}
    assert half == {"frozen.weight", "frozen.bias"}


def test_in_float32_there_is_nothing_to_cast() -> None:
    assert FrozenCopies(nn.Linear(3, 3).requires_grad_(False), torch.float32).copies == []
