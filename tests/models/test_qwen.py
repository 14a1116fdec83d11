from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.models import FAMILIES, draw_image

from vlm2vec.errors import UserError
from vlm2vec.models.embedder import Embedder
from vlm2vec.types import EmbeddingInput

GOLDEN = Path(__file__).parents[1] / "golden/qwen2vl"
CASES = json.loads((GOLDEN / "golden.json").read_text())["cases"]
INPUTS = [
    {"text": case["text"].replace("<|image_pad|>", "<|image_1|>")}
    | ({"images": [GOLDEN / case["image"]]} if case["image"] else {})
    for case in CASES
]
LINE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen4_exp"]
STARTED = {"image": draw_image(90, 40, 1), "text": "<|vision_start|><|image_1|><|vision_end|> what is it?"}
PLAIN = {"image": draw_image(90, 40, 1), "text": "<|image_1|> what is it?"}


def load(source: Path, **options: object) -> Embedder:
    return Embedder.from_pretrained(source, device="cpu", dtype=torch.float32, **options)


def assert_same(vectors: np.ndarray, expected: np.ndarray) -> None:
    cosines = (vectors * expected).sum(axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= 0.99999, cosines


def golden(kind: str) -> np.ndarray:
    return np.array([case[kind] for case in CASES])


def copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


@pytest.mark.parametrize("batch_size", [1, 6])
def test_the_base_equals_all_golden_vectors_of_transformers_4_46(batch_size):
    model = load(GOLDEN / "base")
    assert model.backbone.options()["positions"] == "text"  # by the version that wrote the weights
    assert_same(model.encode(INPUTS, batch_size=batch_size), golden("base"))


def test_a_dora_adapter_with_the_key_prefixes_of_old_equals_all_its_golden_vectors():
    model = load(GOLDEN / "adapter", base=str(GOLDEN / "base"))
    assert_same(model.encode(INPUTS), golden("adapter"))
    assert (golden("adapter") * golden("base")).sum(axis=1).max() < 0.9


def test_an_adapter_knows_its_base_by_its_own_config(tmp_path):
    folder = copied(GOLDEN / "adapter", tmp_path / "adapter")
    about = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": str(GOLDEN / "base")}))
    assert_same(load(folder).encode(INPUTS[:1]), golden("adapter")[:1])
    with pytest.raises(UserError, match=r"adapter_config\.json: base_model_name_or_path is empty.*base="):
        load(GOLDEN / "adapter")


def test_an_adapter_saved_again_gives_the_same_vectors(tmp_path):
    folder = load(GOLDEN / "adapter", base=str(GOLDEN / "base")).save_pretrained(tmp_path / "again")
    assert "base_model.model.language_model." in min(load_file(folder / "adapter_model.safetensors"))
    assert_same(load(folder).encode(INPUTS), golden("adapter"))


@pytest.mark.parametrize("kind", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_a_missing_adapter_tensor_is_named(kind, tmp_path):
    folder = copied(GOLDEN / "adapter", tmp_path / "adapter")
    state = load_file(folder / "adapter_model.safetensors")
    del state[next(name for name in state if kind in name and "layers.1.self_attn.v_proj" in name)]
    save_file(state, folder / "adapter_model.safetensors")
    named = re.escape(f"language_model.layers.1.self_attn.v_proj.{kind}")
    with pytest.raises(UserError, match=f"{named}.* is missing") as caught:
        load(folder, base=str(GOLDEN / "base"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", ["model.layers.7.self_attn.v_proj", "visual.blocks.0.attn.qkv", "nothing.like_it"])
def test_an_adapter_tensor_without_a_place_is_named(module, tmp_path):
    folder = copied(GOLDEN / "adapter", tmp_path / "adapter")
    state = load_file(folder / "adapter_model.safetensors")
    state[f"base_model.model.{module}.lora_A.weight"] = torch.zeros(4, 32)
    save_file(state, folder / "adapter_model.safetensors")
    tail = re.escape(module.removeprefix("model."))
    with pytest.raises(UserError, match=f"{tail}.* (was not used|is missing|does not name)"):
        load(folder, base=str(GOLDEN / "base"))


def transformers_own(model: Embedder, value: dict) -> np.ndarray:
    """A plain forward of transformers, which gives images three axes whether or not vision-start is there."""
    batch = model.backbone.process([EmbeddingInput.of(value)])
    tensors = {name: tensor for name, tensor in batch.tensors.items() if name != "position_ids"}
    with torch.inference_mode():
        vector = model.backbone.model(**tensors).last_hidden_state[:, -1]
    return torch.nn.functional.normalize(vector, dim=-1).numpy()


@pytest.mark.parametrize("family", LINE)
def test_images_have_the_positions_of_the_chosen_scheme(family, tiny_vlm):
    values = [STARTED, "dogs", PLAIN]
    schemes = ("text", "vision-start", "multimodal")
    text, started, multimodal = (load(tiny_vlm(family), positions=scheme) for scheme in schemes)
    own = np.concatenate([transformers_own(multimodal, value) for value in (STARTED, PLAIN)])
    assert_same(multimodal.encode(values)[[0, 2]], own)
    assert_same(started.encode(values)[:1], own[:1])  # with batch mates of either kind
    plain = text.encode(values)
    assert_same(started.encode(values)[1:], plain[1:])
    assert (plain[[0, 2]] * own).sum(axis=1).max() < 0.9999
    assert_same(load(tiny_vlm(family)).encode(values), started.encode(values))  # weights of today's transformers


@pytest.mark.parametrize(
    ("version", "scheme"), [("4.46.3", "text"), ("4.47.0", "vision-start"), (None, "vision-start")]
)
def test_the_usual_positions_are_those_of_the_version_that_wrote_the_weights(version, scheme, tiny_vlm, tmp_path):
    folder = copied(tiny_vlm("qwen2_vl"), tmp_path / "model")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"transformers_version": version}))
    model = load(folder)
    assert model.backbone.options()["positions"] == scheme
    saved = load(model.save_pretrained(tmp_path / "saved"))
    assert saved.backbone.options()["positions"] == scheme


def test_every_family_of_the_line_is_in_the_tests_of_all_families():
    assert set(LINE) <= set(FAMILIES)
