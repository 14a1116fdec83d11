from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm2vec import Embedder, EmbeddingInput
from vlm2vec.batch import Batch, cut_by_tokens
from vlm2vec.losses import NO_QUERY, Exclusions, Labels, Reference, contrastive_loss, info_nce
from vlm2vec.media.images import ImageRef
from vlm2vec.models.checkpoints.folder import add_adapter
from vlm2vec.training import gradcache
from vlm2vec.training.gradcache import cached_backward

SIZE = 7


def build(source: str, dropout: float, **options: int) -> Embedder:
    torch.manual_seed(0)
    embedder = Embedder.from_pretrained(source, dtype=torch.float32, **options)
    for module in embedder.modules():
        if isinstance(module, torch.nn.Dropout):  # of the base itself
            module.p = dropout
    add_adapter(embedder.backbone, rank=4, alpha=8, dropout=dropout, targets=None)
    for name, parameter in embedder.named_parameters():
        if "lora_B" in name:  # zero at the start: nothing would flow back to lora_A
            torch.nn.init.normal_(parameter, std=0.05)
    return embedder.train()


def inputs() -> tuple[list[EmbeddingInput], list[EmbeddingInput]]:
    """Text-only rows, rows with one image and with two, of uneven length."""
    images = [ImageRef.of(Image.new("RGB", (30 + 9 * i, 40), (40 * i, 200 - 20 * i, 90))) for i in range(4)]
    queries = [EmbeddingInput(text=f"query {'word ' * i}{i}") for i in range(3)]
    queries += [EmbeddingInput(text=f"look {i}", images=(images[i],)) for i in range(3)]
    queries += [EmbeddingInput(text="compare", images=(images[2], images[3]))]
    targets = [EmbeddingInput(images=(images[i],)) for i in range(2)]
    targets += [EmbeddingInput(text=f"answer {'so ' * (5 - i)}{i}") for i in range(SIZE + 1 - 2)]
    return queries, targets


def batch_of(embedder: Embedder) -> Batch:
    queries, targets = inputs()
    return embedder.backbone.process(queries + targets)


def loss(vectors_UD: torch.Tensor) -> torch.Tensor:
    return info_nce(vectors_UD[:SIZE], vectors_UD[SIZE:], torch.arange(SIZE), temperature=0.05)


def gradients(embedder: Embedder, run: Callable[[], torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    embedder.zero_grad()
    torch.manual_seed(7)
    value = run()
    found = {n: p.grad.clone() for n, p in embedder.named_parameters() if p.requires_grad and p.grad is not None}
    return value.item(), found


def plain(embedder: Embedder, batch: Batch, chunks: Sequence[Sequence[int]]) -> torch.Tensor:
    """The plain loss: all graphs at once. The same chunks forward in the same order, so that dropout draws the same."""
    vectors = torch.cat([embedder(batch.select(rows)) for rows in chunks])
    order = torch.argsort(torch.tensor([row for rows in chunks for row in rows]))
    value = loss(vectors[order])
    value.backward()
    return value


def whole(batch: Batch) -> list[list[int]]:
    return [list(range(len(batch)))]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=2e-3, atol=2e-5 * float(gradient.abs().max()), msg=name)


@pytest.fixture(scope="module", params=[0.0, 0.2], ids=["without dropout", "with dropout"])
def embedder(request: pytest.FixtureRequest) -> Embedder:
    return build("compact", request.param, num_layers=2, visual_tokens=4, image_size=64)


@pytest.mark.parametrize("kept_chunks", [0, 2])
@pytest.mark.parametrize(("max_rows", "max_tokens"), [(1, None), (None, 30), (4, 24)])
def test_the_cached_gradient_equals_the_plain_one(
    embedder: Embedder, max_rows: int | None, max_tokens: int | None, kept_chunks: int | Literal["auto"]
) -> None:
    batch = batch_of(embedder)
    chunks = cut_by_tokens(batch.lengths(), max_rows, max_tokens)
    expected, by_plain = gradients(embedder, lambda: plain(embedder, batch, chunks))
    value, by_cache = gradients(embedder, lambda: cached_backward(embedder, batch, loss, chunks, kept_chunks))
    assert value == pytest.approx(expected, rel=1e-5)
    assert len(by_plain) > 20 and len(chunks) > 2
    assert_equal(by_plain, by_cache)


def test_without_dropout_the_cut_does_not_change_the_gradient() -> None:
    embedder = build("compact", 0.0, num_layers=1, visual_tokens=4, image_size=64)
    batch = batch_of(embedder)
    _, one = gradients(embedder, lambda: plain(embedder, batch, whole(batch)))
    for limits in ((1, None), (3, None), (None, 40), (SIZE, 20)):
        chunks = cut_by_tokens(batch.lengths(), *limits)
        _, other = gradients(embedder, lambda chunks=chunks: cached_backward(embedder, batch, loss, chunks))
        assert_equal(one, other)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 120),
    st.none() | st.integers(1, 120),
)
def test_chunks_hold_every_row_once_within_their_limits(
    lengths: list[int], max_rows: int, max_tokens: int, enough: int | None
) -> None:
    chunks = cut_by_tokens(lengths, max_rows, max_tokens, enough)
    assert sorted(row for rows in chunks for row in rows) == list(range(len(lengths)))
    for rows in chunks:
        assert len(rows) <= max_rows
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= max_tokens
    in_order = [lengths[row] for rows in chunks for row in rows]
    assert in_order == sorted(lengths, reverse=True)


def test_a_chunk_that_is_large_enough_ends_before_much_shorter_rows() -> None:
    lengths = [100, 80, 76, 40, 39, 5]
    assert cut_by_tokens(lengths, None, 1000) == [[0, 1, 2, 3, 4, 5]]
    assert cut_by_tokens(lengths, None, 1000, 80) == [[0, 1, 2], [3, 4], [5]]
    assert cut_by_tokens(lengths, None, 1000, 90) == [[0, 1, 2], [3, 4, 5]]  # 3 and 4 together are not enough yet
    assert cut_by_tokens(lengths, None, 1000, 500) == [[0, 1, 2, 3, 4], [5]]


def test_an_inputs_length_counts_its_visual_tokens(tiny_qwen2_vl: str) -> None:
    embedder = build(tiny_qwen2_vl, dropout=0.0)
    small, large = (ImageRef.of(Image.new("RGB", (28 * n, 28 * n), (90, 9, 200))) for n in (1, 4))
    items = [EmbeddingInput("look", (image,)) for image in (small, large)]
    lengths = embedder.backbone.process(items).lengths()
    assert lengths[1] - lengths[0] == 16 - 1


KINDS = {"info_nce": 1.0}, {"supcon": 1.0, "soft_labels": 0.5}, {"mil_nce": 1.0, "distillation": 0.5}


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "+".join(kinds))
def test_every_kind_of_label_has_the_same_gradient_through_the_cache(
    kinds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = build("compact", 0.0, num_layers=1, visual_tokens=4, image_size=64)
    batch = batch_of(embedder)
    positive_of = torch.tensor([0, 1, 2, 3, 4, 0, NO_QUERY, NO_QUERY, NO_QUERY])  # five queries, nine targets
    given_with = torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 2])
    labels = Labels(torch.arange(5), positive_of, given_with, Exclusions(margin=0.3), 9.0, scores_M=torch.arange(9.0))
    labels.teacher = Reference(torch.eye(5, 9), torch.eye(9))
    assert len(batch) >= 14

    def several(vectors_UD: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(vectors_UD[:5], vectors_UD[5:14], labels, kinds, 0.05)

    monkeypatch.setitem(globals(), "loss", several)
    _, by_plain = gradients(embedder, lambda: plain(embedder, batch, whole(batch)))
    chunks = cut_by_tokens(batch.lengths(), 4, None)
    _, by_cache = gradients(embedder, lambda: cached_backward(embedder, batch, several, chunks))
    assert_equal(by_plain, by_cache)


class ForgetfulState:
    """Does not replay the random state: the second pass draws other dropout masks."""

    def __init__(self, device: torch.device) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def test_a_variant_that_forgets_the_random_state_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = build("compact", 0.2, num_layers=1, visual_tokens=4, image_size=64)
    batch = batch_of(embedder)
    chunks = cut_by_tokens(batch.lengths(), 3, None)
    _, by_plain = gradients(embedder, lambda: plain(embedder, batch, chunks))
    monkeypatch.setattr(gradcache, "RandomState", ForgetfulState)
    _, wrong = gradients(embedder, lambda: cached_backward(embedder, batch, loss, chunks))
    with pytest.raises(AssertionError):
        assert_equal(by_plain, wrong)


def test_a_variant_whose_loss_sees_one_chunk_at_a_time_is_caught() -> None:
    embedder = build("compact", 0.0, num_layers=1, visual_tokens=4, image_size=64)
    batch = batch_of(embedder)
    _, by_plain = gradients(embedder, lambda: plain(embedder, batch, whole(batch)))

    def chunk_by_chunk() -> torch.Tensor:
        total = torch.zeros(())
        for start in range(0, SIZE, 3):
            rows = list(range(start, min(start + 3, SIZE)))
            query, target = batch.select(rows), batch.select([SIZE + row for row in rows])
            part = info_nce(embedder(query), embedder(target), torch.arange(len(rows)), 0.05) * len(rows) / SIZE
            part.backward()
            total += part.detach()
        return total

    _, wrong = gradients(embedder, chunk_by_chunk)
    with pytest.raises(AssertionError):
        assert_equal(by_plain, wrong)
