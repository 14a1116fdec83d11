from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny.models import FAMILIES, draw_image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlm2vec import Embedder, EmbeddingInput
from vlm2vec.batch import Batch
from vlm2vec.models.checkpoints.folder import add_adapter
from vlm2vec.models.last_layer import by_token, last_token_only
from vlm2vec.models.pooling import last_token

TEXTS = [EmbeddingInput("a red car parked on the street"), EmbeddingInput("dogs"), EmbeddingInput("a dog and a cat")]
SEEN = [{"image": draw_image(60, 60, 1)}, {"image": draw_image(40, 70, 2), "text": "what is <|image_1|>?"}]
IMAGES = [EmbeddingInput.of(value) for value in SEEN]


def plain(embedder: Embedder, batch: Batch) -> torch.Tensor:
    """All tokens through the whole model."""
    backbone = embedder.backbone
    return F.normalize(last_token(backbone.hidden_states(batch), batch["attention_mask"]).float(), dim=-1)


@pytest.fixture
def decoder(tiny_vlm) -> Path:
    return tiny_vlm("qwen2_vl")


def small(folder: Path, lora: bool) -> Embedder:
    torch.manual_seed(0)
    embedder = Embedder.from_pretrained(folder, device="cpu", dtype=torch.float32)
    if lora:
        add_adapter(embedder.backbone, rank=4, alpha=8, dropout=0.0, targets=None)
        for parameter_name, parameter in sorted(embedder.named_parameters()):
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.02)
    return embedder


def gradients(embedder: Embedder, vectors_BD: torch.Tensor) -> dict[str, torch.Tensor]:
    (vectors_BD @ torch.arange(vectors_BD.shape[1], dtype=torch.float32)).sum().backward()
    found = {name: p.grad.clone() for name, p in embedder.named_parameters() if p.grad is not None}
    embedder.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_vectors_of_all_tokens_through_all_layers(family: str, tiny_vlm) -> None:
    embedder = Embedder.from_pretrained(tiny_vlm(family), device="cpu", dtype=torch.float32)
    needs_images = family == "paligemma"
    for inputs in [IMAGES] if needs_images else [TEXTS, IMAGES, [*TEXTS, *IMAGES]]:
        batch = embedder.backbone.process(inputs)
        with torch.inference_mode():
            torch.testing.assert_close(embedder(batch), plain(embedder, batch), rtol=1e-5, atol=1e-6)
    assert embedder.backbone.last_parts()


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_those_of_all_tokens_through_all_layers(lora: bool, decoder: Path) -> None:
    embedder = small(decoder, lora).train()
    batch = embedder.backbone.process([*TEXTS, *IMAGES])
    fast, slow = gradients(embedder, embedder(batch)), gradients(embedder, plain(embedder, batch))
    assert fast.keys() == slow.keys() and len(fast) > 10
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-4, atol=1e-4 * float(slow[name].abs().max()))


def test_nearly_all_of_one_of_two_layers_is_not_computed(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = small(decoder, lora=False)
    batch = embedder.backbone.process([EmbeddingInput("word " * 60)] * 4)
    counts = []
    for parts in (embedder.backbone.last_parts(), []):
        monkeypatch.setattr(embedder.backbone, "last_parts", lambda parts=parts: parts)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vectors = embedder(batch)
        counts.append((counter.get_total_flops(), vectors))
    assert counts[0][0] < 0.6 * counts[1][0]
    torch.testing.assert_close(counts[0][1], counts[1][1], rtol=1e-5, atol=1e-6)


def test_the_states_of_all_tokens_are_there_for_those_who_ask_for_them(decoder: Path) -> None:
    embedder = small(decoder, lora=False)
    batch = embedder.backbone.process(TEXTS)
    before = embedder.backbone.hidden_states(batch)
    embedder(batch)
    assert torch.equal(embedder.backbone.hidden_states(batch), before)


def test_mean_pooling_reads_every_token(decoder: Path) -> None:
    embedder = small(decoder, lora=False)
    batch = embedder.backbone.process(TEXTS)
    embedder.backbone.pooling = "mean"
    mask_BL1 = batch["attention_mask"].unsqueeze(-1)
    mean_BD = (embedder.backbone.hidden_states(batch) * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)
    torch.testing.assert_close(embedder(batch), F.normalize(mean_BD, dim=-1), rtol=1e-5, atol=1e-6)


def test_threads_that_share_a_model_do_not_disturb_each_other(decoder: Path) -> None:
    embedder = small(decoder, lora=False)
    batches = [embedder.backbone.process([EmbeddingInput("word " * n), TEXTS[0]]) for n in (3, 9, 3, 20) * 6]
    with torch.no_grad():
        expected = [plain(embedder, batch) for batch in batches]

    def encode(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return embedder(batch)

    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(encode, batches), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


class Layer(nn.Module):
    """With a feed-forward part that has a router of its own."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(2, 3, 3))
        self.up = nn.Linear(3, 3)


def test_experts_and_recomputed_layers_are_left_as_they_are() -> None:
    dense = Layer(nn.Sequential(nn.Linear(3, 3), nn.GELU()))
    assert by_token(dense) == [dense.mlp]
    assert by_token(Layer(Routed())) == []
    dense.gradient_checkpointing = True
    assert by_token(dense) == []


def test_a_part_that_is_called_with_other_rows_works_as_ever() -> None:
    part = nn.Linear(3, 3)
    mask_BL = torch.tensor([[1, 1, 0], [1, 1, 1]])
    states = torch.randn(2, 3, 3)
    with last_token_only([part], mask_BL):
        found, single = part(states), part(states[:1])
    torch.testing.assert_close(single, part(states[:1]))
    torch.testing.assert_close(found[[0, 1], [1, 2]], part(states)[[0, 1], [1, 2]])
    assert not found[0, [0, 2]].any()
    assert torch.equal(part(states), part(states)) and not part._forward_hooks and not part._forward_pre_hooks


@pytest.mark.parametrize(("side", "stored"), [("right", False), ("left", True)])
def test_causal_layers_store_no_mask_for_padding_on_the_right(
    side: str, stored: bool, tiny_vlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = Embedder.from_pretrained(tiny_vlm("qwen2_vl"), device="cpu", dtype=torch.float32, padding_side=side)
    masks, attend = [], F.scaled_dot_product_attention

    def seen(*tensors, attn_mask=None, **settings):
        masks.append(attn_mask)
        return attend(*tensors, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    with torch.inference_mode():
        embedder(embedder.backbone.process(TEXTS))
    assert masks and {mask is not None for mask in masks} == {stored}
