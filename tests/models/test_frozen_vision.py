from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny.fixtures import tiny_vlm  # noqa: F401
from tiny.models import FAMILIES

from vlm2vec import Embedder, EmbeddingInput, UserError
from vlm2vec.batch import Batch
from vlm2vec.media.images import ImageRef
from vlm2vec.models.checkpoints.folder import add_adapter
from vlm2vec.models.vision.frozen_vision import FrozenVision, row_keys, vision_fingerprint
from vlm2vec.models.vision.vision_cache import FeatureStore, join_rows, split_output
from vlm2vec.training.gradcache import cached_backward

TinyVlm = Callable[[str], Path]
CHUNKS = [[0, 1], [2, 3], [4]]


def build(folder: Path, dropout: float = 0.2, targets: str | None = None) -> Embedder:
    torch.manual_seed(0)
    embedder = Embedder.from_pretrained(folder, dtype=torch.float32)
    add_adapter(embedder.backbone, rank=2, alpha=4, dropout=dropout, targets=targets)
    for name, parameter in embedder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return embedder.train()


def batch_of(embedder: Embedder) -> Batch:
    images = [ImageRef.of(Image.new("RGB", (30 + 20 * i, 60), (40 * i, 200, 90))) for i in range(3)]
    items = [
        EmbeddingInput("one", (images[0],)),
        EmbeddingInput("words only"),
        EmbeddingInput("two", (images[1], images[2])),
        EmbeddingInput("the first again, with other words", (images[0],)),
        EmbeddingInput("words again"),
    ]
    return embedder.backbone.process(items)


def gradient(embedder: Embedder, batch: Batch, vision: FrozenVision | None, kept: int = 0) -> dict[str, torch.Tensor]:
    embedder.zero_grad()
    torch.manual_seed(3)
    around = {"around": vision.serving} if vision else {}
    weight = torch.linspace(-1, 1, embedder.embedding_dim)
    cached_backward(embedder, batch, lambda v: (v @ weight).pow(2).sum(), CHUNKS, kept, **around)  # type: ignore[arg-type]
    if vision:
        vision.forget()
    return {n: p.grad.clone() for n, p in embedder.named_parameters() if p.grad is not None}


def fingerprint(embedder: Embedder, precision: str = "float32") -> str:
    return vision_fingerprint(embedder.backbone.model, embedder.backbone.language_parts(), precision)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=name, **tolerance)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "idefics3", "internvl"])
def test_kept_features_give_the_same_gradient_and_the_vision_side_runs_once(
    tiny_vlm: TinyVlm,  # noqa: F811
    family: str,
) -> None:
    embedder = build(tiny_vlm(family))
    batch = batch_of(embedder)
    plain = gradient(embedder, batch, None)
    vision = FrozenVision(embedder.backbone.model)
    for kept in (0, 1):
        vision.num_runs = 0
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if kept else {"rtol": 0, "atol": 0}  # kept ones are summed first
        assert_equal(plain, gradient(embedder, batch, vision, kept), **tolerance)
        assert vision.frozen and vision.num_runs == 2  # the third chunk has no images
    vision.remove()
    assert_equal(plain, gradient(embedder, batch, None), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_the_second_pass_is_given_no_pixel_values(tiny_vlm: TinyVlm, family: str) -> None:  # noqa: F811
    embedder = build(tiny_vlm(family))
    embedder.backbone.send_bytes()
    batch = batch_of(embedder)
    plain = gradient(embedder, batch, None)
    given: list[int] = []

    def record(module: Embedder, inputs: tuple[Batch]) -> None:
        if (pixels := inputs[0].get("pixel_values")) is not None and len(pixels):
            given.append(pixels.untyped_storage().nbytes())

    embedder.register_forward_pre_hook(record)
    assert_equal(plain, gradient(embedder, batch, FrozenVision(embedder.backbone.model)), rtol=0, atol=0)
    assert min(given[:2]) > 1000 and given[2:] == [4, 4]


def test_a_trained_vision_side_is_found_out_and_trained(tiny_vlm: TinyVlm) -> None:  # noqa: F811
    embedder = build(tiny_vlm("qwen2_vl"), targets=r".*(q_proj|attn\.qkv)")
    batch = batch_of(embedder)
    plain = gradient(embedder, batch, None)
    assert any("visual" in name for name in plain)
    vision = FrozenVision(embedder.backbone.model)
    assert_equal(plain, gradient(embedder, batch, vision), rtol=0, atol=0)
    assert vision.frozen is False


def test_one_trained_bias_is_enough_for_the_vision_side_to_run_twice(tiny_vlm: TinyVlm) -> None:  # noqa: F811
    embedder = build(tiny_vlm("llava"))
    name, bias = next((n, p) for n, p in embedder.named_parameters() if re.search(r"projector.*bias", n))
    bias.requires_grad_(True)
    batch = batch_of(embedder)
    plain = gradient(embedder, batch, None)
    assert name in plain
    vision = FrozenVision(embedder.backbone.model)
    assert_equal(plain, gradient(embedder, batch, vision), rtol=0, atol=0)
    assert vision.frozen is False


def test_dropout_inside_the_frozen_side_leaves_the_gradient_as_it_is(tiny_vlm: TinyVlm) -> None:  # noqa: F811
    embedder = build(tiny_vlm("idefics3"))
    for module in embedder.modules():
        if "VisionAttention" in type(module).__name__:
            module.dropout = 0.3
    batch = batch_of(embedder)
    plain = gradient(embedder, batch, None)
    vision = FrozenVision(embedder.backbone.model)
    assert_equal(plain, gradient(embedder, batch, vision), rtol=0, atol=0)
    assert vision.frozen and vision.num_runs == 2


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "idefics3", "internvl"])
def test_features_on_disk_serve_another_job_in_other_batches(
    tiny_vlm: TinyVlm,  # noqa: F811
    family: str,
    tmp_path: Path,
) -> None:
    embedder = build(tiny_vlm(family), dropout=0.0)
    batch = batch_of(embedder)
    plain = gradient(embedder, batch, None)
    finger = fingerprint(embedder)
    store = FeatureStore(tmp_path, finger)
    gradient(embedder, batch, FrozenVision(embedder.backbone.model, store))
    store.flush()
    again = build(tiny_vlm(family), dropout=0.0)
    assert fingerprint(again) == finger
    vision = FrozenVision(again.backbone.model, FeatureStore(tmp_path, finger))
    turned = batch.select([3, 1, 0, 2, 4])
    assert_equal(plain, gradient(again, turned, vision), rtol=1e-3, atol=1e-6)
    assert vision.num_runs == 0


def test_the_fingerprint_changes_with_a_vision_weight_and_not_with_a_language_one(
    tiny_vlm: TinyVlm,  # noqa: F811
) -> None:
    for family in FAMILIES:
        embedder = Embedder.from_pretrained(tiny_vlm(family), dtype=torch.float32)
        before = fingerprint(embedder)
        language = {id(p) for p in embedder.backbone.language_model.parameters()}
        named = list(embedder.backbone.model.named_parameters())
        inside = next(p for _, p in named if id(p) in language)
        vision = next(p for name, p in named if "vision" in name or "visual" in name)
        with torch.no_grad():
            inside.view(-1)[0] += 1
            assert fingerprint(embedder) == before, family
            vision.view(-1)[0] += 1
        assert fingerprint(embedder) != before, family
        assert fingerprint(embedder, "bfloat16") != fingerprint(embedder), family


def test_a_fingerprint_of_no_parameter_is_an_error_not_one_key_for_all_weights() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no parameter outside the language model"):
        vision_fingerprint(model, [model], "float32")


def test_equal_images_have_equal_keys_whatever_the_words(tiny_vlm: TinyVlm) -> None:  # noqa: F811
    keys = row_keys(batch_of(build(tiny_vlm("qwen2_vl"))))
    assert keys[0] == keys[3] != keys[2]
    assert keys[1] == keys[4] == ""


def test_what_cannot_be_told_apart_by_example_is_not_kept() -> None:
    counts = {"pixels": torch.tensor([1, 2])}
    assert split_output(torch.zeros(5, 4), counts, 2) is None
    assert split_output({"pooler_output": torch.zeros(3, 4), "other": torch.zeros(7)}, counts, 2) is None
    two_ways = {"pixels": torch.tensor([1, 2]), "sizes": torch.tensor([2, 1])}
    assert split_output(torch.zeros(3, 4), two_ways, 2) is None


@pytest.mark.parametrize("num_levels", [2, 3])  # three is also the number of images
def test_outputs_of_several_levels_are_taken_apart_and_put_together_again(num_levels: int) -> None:
    counts = {"pixels": torch.tensor([8, 0, 4]), "grid": torch.tensor([2, 0, 1])}
    images = [torch.randn(n, 4) for n in (2, 3, 1)]
    output = {
        "pooler_output": images,
        "deepstack_features": [tuple(p + level for p in images) for level in range(1, num_levels + 1)],
    }
    parts = split_output(output, counts, 3)
    assert parts is not None and not parts[1]
    turned = join_rows([parts[2], parts[0]])
    order = [2, 0, 1]
    for one, image in zip(turned.pooler_output, order, strict=True):
        assert torch.equal(one, images[image])
    for level, features in enumerate(turned.deepstack_features, start=1):
        assert all(torch.equal(f, images[i] + level) for f, i in zip(features, order, strict=True))


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "abc").mkdir()
    (tmp_path / "abc" / "x.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"x\.safetensors: damaged cache of image features"):
        FeatureStore(tmp_path, "abc")
