"""Adapters in PEFT format on a network without a head: equal hidden states, or a one-line error."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlm2vec import Embedder, EmbeddingInput, UserError
from vlm2vec.media.images import ImageRef

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's advice about its own options
TEXTS = ["a red cat on the mat", "two words"]
LANGUAGE = r".*language_model.*\.(q_proj|v_proj)"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "rank_pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"q_proj": 9},
    },
    "rank_pattern by path": {"target_modules": LANGUAGE, "rank_pattern": {r"language_model\.layers\.0\..*": 2}},
    "bias": {"target_modules": ["q_proj"], "bias": "all"},
    "bias of the layers": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "pattern": {"target_modules": LANGUAGE},
    "all-linear": {"target_modules": "all-linear"},
    "bias of LoRA": {"target_modules": ["q_proj"], "lora_bias": True},
    "excluded layers": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0\..*"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "principal components": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "dora of embeddings": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "saved norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "trainable tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5]}},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "trainable tokens by name": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 6]}},
}


def write_adapter(
    base: Path, folder: Path, options: dict[str, Any] | PeftConfig, task_type: str | None
) -> list[np.ndarray]:
    """Trains nothing: fills every adapter tensor with noise, saves, and returns the last hidden state of each text."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    is_lora = isinstance(options, dict)
    config = LoraConfig(r=4, lora_alpha=6, task_type=task_type, **options) if is_lora else options
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it saves embeddings, too
        adapted.save_pretrained(folder)
    about = folder / "adapter_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "base_model_name_or_path": str(base)}))
    reloaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), folder)
    prepared = Embedder.from_pretrained(base, dtype=torch.float32, device="cpu")
    vectors = []
    for text in TEXTS:
        ids = prepared.backbone.process([EmbeddingInput(text=text)])["input_ids"]
        with torch.no_grad():
            output = reloaded(input_ids=ids, output_hidden_states=True)
        vector = output.hidden_states[-1][0, -1].numpy()
        vectors.append(vector / np.linalg.norm(vector))
    return vectors


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_adapter_gives_the_vectors_of_peft(tiny_vlm, tmp_path, family, name):
    task_type = ["CAUSAL_LM", "FEATURE_EXTRACTION", None][list(OPTIONS).index(name) % 3]
    expected = write_adapter(tiny_vlm(family), tmp_path / "adapter", OPTIONS[name], task_type)
    embedder = Embedder.from_pretrained(tmp_path / "adapter", dtype=torch.float32, device="cpu")
    np.testing.assert_allclose(embedder.encode(TEXTS), np.stack(expected), atol=2e-5)
    again = Embedder.from_pretrained(embedder.save_pretrained(tmp_path / "again"), dtype=torch.float32, device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), np.stack(expected), atol=2e-5)


TUNERS: dict[str, Callable[[], PeftConfig]] = {
    "AdaLoRA": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]),
    "IA3": lambda: IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LN": lambda: LNTuningConfig(target_modules=["input_layernorm"]),
    "LoHa": lambda: LoHaConfig(r=4, target_modules=["q_proj"]),
    "LoKr": lambda: LoKrConfig(r=4, target_modules=["q_proj"]),
    "OFT": lambda: OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "VeRA": lambda: VeraConfig(r=4, target_modules=["q_proj"]),
    "VeRA without its projection": lambda: VeraConfig(r=4, target_modules=["q_proj"], save_projection=False),
    "HRA": lambda: HRAConfig(r=4, target_modules=["q_proj"]),
    "trainable tokens alone": lambda: TrainableTokensConfig(token_indices=[5], target_modules=["embed_tokens"]),
}


@pytest.mark.parametrize("name", TUNERS)
def test_another_kind_of_adapter_gives_the_vectors_of_peft(tiny_vlm, tmp_path, name):
    expected = write_adapter(tiny_vlm("qwen2_vl"), tmp_path / "adapter", TUNERS[name](), None)
    embedder = Embedder.from_pretrained(tmp_path / "adapter", dtype=torch.float32, device="cpu")
    np.testing.assert_allclose(embedder.encode(TEXTS), np.stack(expected), atol=2e-5)


# Names of modules: as transformers 5 saves them, and as version 4.51 and earlier did.
EARLIER = {
    "qwen2_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "llava": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
}


@pytest.mark.parametrize("family", EARLIER)
@pytest.mark.parametrize("layout", ["earlier transformers", "without a head"])
@pytest.mark.parametrize("options", ["all-linear", "dora", "saved embeddings"])
def test_the_layouts_of_other_versions_give_the_same_vectors(tiny_vlm, tmp_path, family, layout, options):
    folder = tmp_path / "adapter"
    write_adapter(tiny_vlm(family), folder, OPTIONS[options], None)
    image = Image.effect_noise((64, 48), 80).convert("RGB")
    inputs = [*TEXTS, EmbeddingInput(text="a cat", images=(ImageRef.of(image),))]
    expected = Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu").encode(inputs)
    state = load_file(folder / "adapter_model.safetensors")
    names = EARLIER[family] if layout == "earlier transformers" else {"model.": ""}
    prefix = "base_model.model."

    def renamed(name: str) -> str:
        new = next((new for new in names if name.startswith(prefix + new)), None)
        return name if new is None else prefix + names[new] + name.removeprefix(prefix + new)

    found = {renamed(name): value for name, value in state.items()}
    assert set(found) != set(state)
    save_file(found, folder / "adapter_model.safetensors")
    actual = Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu").encode(inputs)
    np.testing.assert_array_equal(actual, expected)


@pytest.fixture(scope="module")
def plain(tiny_vlm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "plain"
    write_adapter(tiny_vlm("qwen2_vl"), folder, OPTIONS["plain"], "CAUSAL_LM")
    return folder


def test_a_pickled_adapter_loads_where_it_is_allowed(plain, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(plain, folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model.bin: pickled weights can run code.*allow_pickle=True"):
        Embedder.from_pretrained(folder)
    vectors = [
        Embedder.from_pretrained(path, dtype=torch.float32, device="cpu", **options).encode(TEXTS)
        for path, options in ((plain, {}), (folder, {"allow_pickle": True}))
    ]
    np.testing.assert_array_equal(*vectors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 8}, "size mismatch"),
        ({"lora_alpha": "much"}, "PEFT cannot load this adapter onto"),
        ({"rank_pattern": {"q_proj": 7}}, "size mismatch"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is not supported"),
        ({"peft_type": "NO_SUCH"}, "adapter_config.json is not readable"),
        ({"use_magic": True}, "unknown key use_magic, which may change the weights; update peft"),
        ({"r": 4.0}, "PEFT cannot load this adapter onto"),
        ({"rank_pattern": None}, "PEFT cannot load this adapter onto"),
        ({"alpha_pattern": ["a"]}, "PEFT cannot load this adapter onto"),
        ({"init_lora_weights": "magic"}, "Unknown initialization"),
        ({"bias": "all"}, "is missing"),
        ({"use_dora": True}, "is missing"),
        ({"base_model_name_or_path": "/no/such"}, "no such checkpoint folder"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is empty"),
    ],
)
def test_a_bad_configuration_is_one_line(plain, tmp_path, change, words):
    folder = tmp_path / "bad"
    shutil.copytree(plain, folder)
    about = folder / "adapter_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), **change}))
    with pytest.raises(UserError, match=words) as caught:
        Embedder.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_settings_of_earlier_versions_that_are_off_are_accepted(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "old")
    about = json.loads((plain / "adapter_config.json").read_text())
    kept = ("base_model_name_or_path", "peft_type", "r", "lora_alpha", "target_modules", "task_type")
    old = {name: about[name] for name in kept} | {"enable_lora": None, "merge_weights": False, "bias": "none"}
    (tmp_path / "old/adapter_config.json").write_text(json.dumps(old))
    vectors = [
        Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu").encode(TEXTS)
        for folder in (plain, tmp_path / "old")
    ]
    np.testing.assert_array_equal(*vectors)


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, b"<html>404", b"version https://git-lfs.github.com/spec/v1\n"])
def test_weights_that_are_no_safetensors_are_one_line(plain, tmp_path, content):
    shutil.copytree(plain, tmp_path / "bad")
    (tmp_path / "bad/adapter_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a readable safetensors file") as caught:
        Embedder.from_pretrained(tmp_path / "bad")
    assert "\n" not in str(caught.value)


def test_an_adapter_whose_weights_depend_on_the_batch_is_refused(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "lily")
    base = json.loads((plain / "adapter_config.json").read_text())["base_model_name_or_path"]
    about = {"peft_type": "LILY", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": base}
    (tmp_path / "lily/adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="peft_type LILY is not supported"):
        Embedder.from_pretrained(tmp_path / "lily")


def test_a_learned_prompt_is_refused(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "prompt")
    base = json.loads((plain / "adapter_config.json").read_text())["base_model_name_or_path"]
    about = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "base_model_name_or_path": base}
    (tmp_path / "prompt/adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="peft_type PROMPT_TUNING is not supported"):
        Embedder.from_pretrained(tmp_path / "prompt")


def test_embeddings_of_a_resized_vocabulary_are_refused(tiny_vlm, tmp_path):
    folder = tmp_path / "adapter"
    write_adapter(tiny_vlm("llava"), folder, OPTIONS["embeddings"], None)
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    name = next(key for key in state if key.endswith("base_layer.weight") and "embed" in key)
    save_file({**state, name: torch.cat([state[name], state[name][:2]])}, path)
    with pytest.raises(UserError, match="changes the base's input embeddings"):
        Embedder.from_pretrained(folder)
