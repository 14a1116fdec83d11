from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny.models import draw_image
from tokenizers import Tokenizer, normalizers

from vlm2vec.errors import UserError
from vlm2vec.models.backbones.phi3_v_parts import Phi3VConfig, num_tokens, tile
from vlm2vec.models.embedder import Embedder
from vlm2vec.types import EmbeddingInput

GOLDEN = Path(__file__).parents[1] / "golden/phi3v"
CASES = json.loads((GOLDEN / "golden.json").read_text())["cases"]
INPUTS = [
    EmbeddingInput.of({"text": case["text"], "images": [GOLDEN / name for name in case["images"]]}) for case in CASES
]
EXPECTED = np.array([case["embedding"] for case in CASES])


def load(folder: Path = GOLDEN, **options: object) -> Embedder:
    return Embedder.from_pretrained(folder, device="cpu", dtype=torch.float32, **options)


def cosines(vectors: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return (vectors * expected).sum(axis=1) / np.linalg.norm(expected, axis=1)


def copy_of_golden(folder: Path, **config: object) -> Path:
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("*.png", "golden.json"))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return folder


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return load()


def test_the_vectors_of_the_original_code_are_reproduced_one_by_one(embedder):
    assert cosines(embedder.encode(INPUTS, batch_size=1), EXPECTED).min() >= 0.99999


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_vectors_of_the_original_code_are_reproduced_in_one_batch_on_either_padding_side(side):
    batch = load(padding_side=side).backbone.process(INPUTS)
    assert batch["attention_mask"][:, -1].all() == (side == "left")
    with torch.inference_mode():
        assert cosines(load(padding_side=side)(batch).numpy(), EXPECTED).min() >= 0.99999


@pytest.mark.parametrize(("case", "tail"), [(i, case["input_ids_tail"]) for i, case in enumerate(CASES)])
def test_token_ids_are_as_many_and_end_as_the_original_ones(embedder, case, tail):
    ids = embedder.backbone.process([INPUTS[case]])["input_ids"][0].tolist()
    assert len(ids) == CASES[case]["num_tokens"]
    assert ids[-5:] == tail


def test_parts_of_a_split_batch_hold_their_own_images(embedder):
    whole = embedder.backbone.process(INPUTS)
    parts = list(whole.split(2))
    assert [part["image_sizes"].shape[0] for part in parts] == [1, 2, 2]
    with torch.inference_mode():
        assert cosines(np.concatenate([embedder(part).numpy() for part in parts]), EXPECTED).min() >= 0.99999


@given(st.integers(3, 900), st.integers(3, 900), st.integers(1, 16))
@settings(max_examples=25)
def test_tiles_put_together_are_the_image_in_white_borders(width, height, num_crops):
    tiles, (down, across) = tile(Image.new("RGB", (width, height)), num_crops)
    assert 1 <= down * across <= num_crops
    assert tiles.shape == (down * across, 3, 336, 336)
    whole = tiles.view(down, across, 3, 336, 336).permute(2, 0, 3, 1, 4).reshape(3, down * 336, across * 336)
    black = (whole == 0).all(dim=0)
    rows, columns = black.any(dim=1), black.any(dim=0)
    assert int(rows.sum()) * int(columns.sum()) == int(black.sum())  # a rectangle
    assert (whole[:, ~black] == 255).all()
    scale = max(down, across) if width != height else across
    short = int(scale * 336 * min(width, height) / max(width, height))
    assert abs(int(rows.sum() if width >= height else columns.sum()) - short) <= 1
    assert bool(columns.all() if width >= height else rows.all())


def test_an_image_on_its_side_has_its_tiles_on_their_side():
    image = draw_image(300, 120, 5)
    tiles, size = tile(image, 4)
    turned, turned_size = tile(image.transpose(Image.Transpose.TRANSPOSE), 4)
    assert turned_size == size[::-1]
    assert torch.equal(turned, tiles.transpose(2, 3))


@pytest.mark.parametrize(("num_crops", "tokens"), [(1, 313), (4, 757), (16, 2509)])
def test_the_number_of_crops_is_a_setting_and_is_saved(num_crops, tokens, tmp_path):
    assert num_tokens(*tile(draw_image(50, 50, 0), num_crops)[1]) == tokens
    if num_crops != 1:
        return
    item = {"image": draw_image(50, 50, 0), "text": "a cat"}
    few = load(num_crops=1)
    folder = few.save_pretrained(tmp_path / "saved")
    again = load(folder)
    assert again.backbone.options() == {"num_crops": 1}
    np.testing.assert_allclose(again.encode([item]), few.encode([item]), atol=1e-6)
    assert cosines(load().encode([item]), few.encode([item]))[0] < 0.9999
    assert json.loads((folder / "preprocessor_config.json").read_text())["num_crops"] == 1


def test_long_examples_have_their_own_rotary_frequencies_whatever_stands_beside_them(tmp_path):
    folder = copy_of_golden(tmp_path / "short-rope", original_max_position_embeddings=16)
    model = load(folder)
    texts = ["a red car", "one two three four five six seven eight nine ten eleven twelve thirteen", "dogs"]
    alone = model.encode(texts, batch_size=1)
    for side in ("right", "left"):
        assert cosines(load(folder, padding_side=side).encode(texts), alone).min() >= 0.99999
    config = Phi3VConfig.from_pretrained(folder)
    decoder = transformers.Phi3Model.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    ids = [model.backbone.processor.tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    assert ids[1].shape[1] > 16 > ids[0].shape[1]
    with torch.inference_mode():
        states = [decoder(input_ids=row).last_hidden_state[:, -1] for row in ids]
    assert cosines(alone, torch.nn.functional.normalize(torch.cat(states), dim=-1).numpy()).min() >= 0.99999
    assert cosines(load().encode(texts[1:2]), alone[1:2])[0] < 0.999  # its short frequencies differ


def test_gradients_reach_the_decoder_and_the_vision_encoder_of_mixed_batches(tmp_path):
    model = load(copy_of_golden(tmp_path / "short-rope", original_max_position_embeddings=16))
    batch = model.backbone.process([EmbeddingInput.of(value) for value in ("dogs", {"image": draw_image(40, 40, 1)})])
    model(batch).square()[:, 0].sum().backward()
    parts = model.backbone.model
    for weight in (parts.layers[0].mlp.down_proj.weight, parts.vision_embed_tokens.img_projection[0].weight):
        assert weight.grad is not None and weight.grad.abs().max() > 0


def test_each_text_around_images_begins_as_the_tokenizer_begins_a_text(tmp_path):
    folder = copy_of_golden(tmp_path / "llama-like", original_max_position_embeddings=4096)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.normalizer = normalizers.Prepend("x")  # today's Llama class would replace it
    raw.save(str(folder / "tokenizer.json"))
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"tokenizer_class": "LlamaTokenizer"}))
    item = EmbeddingInput.of({"text": "<|image_1|> a cat", "images": [draw_image(30, 30, 1)]})
    ids = load(folder, num_crops=1).backbone.process([item])["input_ids"][0].tolist()
    start = raw.token_to_id("<s>")
    assert ids == [start, *[-1] * 313, start, *raw.encode(" a cat").ids]
    only = EmbeddingInput.of({"text": "<|image_1|>", "images": [draw_image(30, 30, 1)]})
    assert load(folder, num_crops=1).backbone.process([only])["input_ids"][0, -2:].tolist() == [-1, start]


def test_code_in_the_folder_is_never_run(tmp_path):
    folder = copy_of_golden(tmp_path / "with-code")
    for name in ("configuration_phi3_v.py", "modeling_phi3_v.py", "processing_phi3_v.py"):
        (folder / name).write_text("raise SystemExit('this code must not run')\n")
    assert cosines(load(folder).encode(INPUTS[:2]), EXPECTED[:2]).min() >= 0.99999


@pytest.mark.parametrize(
    "options", [{"num_crops": 0}, {"num_crops": "four"}, {"padding_side": "top"}, {"min_pixels": 3}]
)
def test_an_unknown_setting_is_one_clear_line(options):
    with pytest.raises(UserError, match=next(iter(options))) as caught:
        load(**options)
    assert "\n" not in str(caught.value)


def test_a_missing_weight_is_one_clear_line_with_its_name(tmp_path):
    folder = copy_of_golden(tmp_path / "damaged")
    state = load_file(folder / "model.safetensors")
    del state["model.vision_embed_tokens.glb_GN"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"damaged.*glb_GN"):
        load(folder)


def test_a_image_too_thin_to_be_tiled_is_one_clear_line_that_names_it(embedder, tmp_path):
    draw_image(4000, 2, 0).save(tmp_path / "thin.png")
    with pytest.raises(UserError, match=r"thin\.png.*too thin"):
        embedder.encode([tmp_path / "thin.png"])
