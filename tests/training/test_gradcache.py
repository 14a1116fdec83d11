from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from PIL import Image

from vlm2vec import Embedder, EmbeddingInput
from vlm2vec.images import ImageRef
from vlm2vec.losses import info_nce
from vlm2vec.models.checkpoint import add_adapter
from vlm2vec.training import gradcache
from vlm2vec.training.gradcache import cached_backward
from vlm2vec.types import Batch

SIZE = 7


def build(source: str, dropout: float, **options: int) -> Embedder:
    torch.manual_seed(0)
    embedder = Embedder.from_pretrained(source, dtype=torch.float32, **options)
    add_adapter(embedder.backbone, rank=4, alpha=8, dropout=dropout, targets=None)
    for name, parameter in embedder.named_parameters():
        if "lora_B" in name:  # zero at the start: nothing would flow back to lora_A
            torch.nn.init.normal_(parameter, std=0.05)
    return embedder.train()


def inputs() -> tuple[list[EmbeddingInput], list[EmbeddingInput]]:
    """Text-only rows, rows with one picture and with two, of uneven length."""
    pictures = [ImageRef.of(Image.new("RGB", (30 + 9 * i, 40), (40 * i, 200 - 20 * i, 90))) for i in range(4)]
    queries = [EmbeddingInput(text=f"query {'word ' * i}{i}") for i in range(3)]
    queries += [EmbeddingInput(text=f"look {i}", images=(pictures[i],)) for i in range(3)]
    queries += [EmbeddingInput(text="compare", images=(pictures[2], pictures[3]))]
    targets = [EmbeddingInput(images=(pictures[i],)) for i in range(2)]
    targets += [EmbeddingInput(text=f"answer {'so ' * (5 - i)}{i}") for i in range(SIZE + 1 - 2)]
    return queries, targets


def loss(sides: Sequence[torch.Tensor]) -> torch.Tensor:
    return info_nce(sides[0], sides[1], torch.arange(SIZE), temperature=0.05)


def gradients(embedder: Embedder, run: Callable[[], torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    embedder.zero_grad()
    torch.manual_seed(7)
    value = run()
    found = {n: p.grad.clone() for n, p in embedder.named_parameters() if p.requires_grad and p.grad is not None}
    return value.item(), found


def plain(embedder: Embedder, sides: Sequence[Batch], chunk_size: int) -> torch.Tensor:
    """The unchunked loss: all graphs at once. Chunks forward in the same order, so that dropout draws the same."""
    whole = [torch.cat([embedder(part) for part in side.split(chunk_size)]) for side in sides]
    value = loss(whole)
    value.backward()
    return value


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=2e-3, atol=2e-5 * float(gradient.abs().max()), msg=name)


@pytest.fixture(scope="module", params=[0.0, 0.2], ids=["without dropout", "with dropout"])
def embedder(request: pytest.FixtureRequest) -> Embedder:
    return build("compact", request.param, num_layers=2, visual_tokens=4, image_size=64)


@pytest.mark.parametrize("kept_chunks", [0, 2])
@pytest.mark.parametrize("chunk_size", [1, 3, SIZE])
def test_the_cached_gradient_equals_the_plain_one(embedder: Embedder, chunk_size: int, kept_chunks: int) -> None:
    sides = [embedder.backbone.process(side) for side in inputs()]
    expected, by_plain = gradients(embedder, lambda: plain(embedder, sides, chunk_size))
    value, by_cache = gradients(embedder, lambda: cached_backward(embedder, sides, loss, chunk_size, kept_chunks))
    assert value == pytest.approx(expected, rel=1e-5)
    assert len(by_plain) > 20
    assert_equal(by_plain, by_cache)


def test_a_model_whose_pictures_are_packed_patches_has_the_plain_gradient_too(tiny_qwen2_vl: str) -> None:
    embedder = build(tiny_qwen2_vl, dropout=0.2)
    sides = [embedder.backbone.process(side) for side in inputs()]
    _, by_plain = gradients(embedder, lambda: plain(embedder, sides, 3))
    _, by_cache = gradients(embedder, lambda: cached_backward(embedder, sides, loss, 3))
    assert_equal(by_plain, by_cache)


def test_without_dropout_the_chunk_size_does_not_change_the_gradient() -> None:
    embedder = build("compact", 0.0, num_layers=1, visual_tokens=4, image_size=64)
    sides = [embedder.backbone.process(side) for side in inputs()]
    _, one = gradients(embedder, lambda: plain(embedder, sides, 100))
    for chunk_size in (1, 3, SIZE):
        _, other = gradients(embedder, lambda size=chunk_size: cached_backward(embedder, sides, loss, size))
        assert_equal(one, other)


class ForgetfulState:
    """Does not replay the random state: the second pass draws other dropout masks."""

    def __init__(self, device: torch.device) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def test_a_variant_that_forgets_the_random_state_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = build("compact", 0.2, num_layers=1, visual_tokens=4, image_size=64)
    sides = [embedder.backbone.process(side) for side in inputs()]
    _, by_plain = gradients(embedder, lambda: plain(embedder, sides, 3))
    monkeypatch.setattr(gradcache, "RandomState", ForgetfulState)
    _, wrong = gradients(embedder, lambda: cached_backward(embedder, sides, loss, 3))
    with pytest.raises(AssertionError):
        assert_equal(by_plain, wrong)


def test_a_variant_whose_loss_sees_one_chunk_at_a_time_is_caught() -> None:
    embedder = build("compact", 0.0, num_layers=1, visual_tokens=4, image_size=64)
    queries, targets = inputs()
    sides = [embedder.backbone.process(queries), embedder.backbone.process(targets[:SIZE])]
    _, by_plain = gradients(embedder, lambda: plain(embedder, sides, SIZE))

    def chunk_by_chunk() -> torch.Tensor:
        total = torch.zeros(())
        for query, target in zip(sides[0].split(3), sides[1].split(3), strict=True):
            part = info_nce(embedder(query), embedder(target), torch.arange(len(query)), 0.05) * len(query) / SIZE
            part.backward()
            total += part.detach()
        return total

    _, wrong = gradients(embedder, chunk_by_chunk)
    with pytest.raises(AssertionError):
        assert_equal(by_plain, wrong)
