"""VLM2Vec-LoRA's layout: an adapter on Phi-3.5-V with a language-model head, on decoder and vision encoder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.models import draw_image

from vlm2vec import Embedder, UserError
from vlm2vec.models.verification.export import export

BASE = Path(__file__).parents[1] / "golden/phi3v"
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "k_proj", "q_proj", "out_proj", "v_proj"]
RANK, ALPHA = 2, 8
INPUTS = [
    "a red car",
    {"image": draw_image(60, 40, 1), "text": "<|image_1|>\nWhat is it?"},
    {"image": draw_image(40, 50, 2)},
]


def load(source: Path, **options: object) -> Embedder:
    return Embedder.from_pretrained(source, device="cpu", dtype=torch.float32, num_crops=1, **options)


def write_adapter(folder: Path, dora: bool) -> dict[str, torch.Tensor]:
    """As PEFT wrote it around the original class; returns the base's weights with the change worked in, by hand."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    merged, adapter = load_file(BASE / "model.safetensors"), {}
    for name in [name for name in merged if name.split(".")[-2] in TARGETS and name.endswith("weight")]:
        path, weight = f"base_model.model.{name.removesuffix('.weight')}", merged[name]
        low = torch.randn(RANK, weight.shape[1], generator=random) * 0.1
        high = torch.randn(weight.shape[0], RANK, generator=random) * 0.1
        adapter |= {f"{path}.lora_A.weight": low, f"{path}.lora_B.weight": high}
        changed = weight + ALPHA / RANK * high @ low
        if dora:  # each row has a length of its own
            length = weight.norm(dim=1) * (1 + 0.2 * torch.rand(len(weight), generator=random))
            adapter[f"{path}.lora_magnitude_vector"] = length
            changed = changed * (length / changed.norm(dim=1))[:, None]
        merged[name] = changed
    about = {"peft_type": "LORA", "task_type": None, "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.1}
    about |= {"target_modules": TARGETS, "use_dora": dora, "bias": "none", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": str(BASE)}))
    save_file(adapter, folder / "adapter_model.safetensors")
    return merged


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def adapter(request, tmp_path_factory) -> Path:
    """The folder `lora` beside `full`, the same model with the change in its weights."""
    root = tmp_path_factory.mktemp("phi3v")
    merged = write_adapter(root / "lora", request.param)
    shutil.copytree(BASE, root / "full", ignore=shutil.ignore_patterns("*.png", "golden.json"))
    save_file(merged, root / "full/model.safetensors", metadata={"format": "pt"})
    return root / "lora"


@pytest.fixture(scope="module")
def expected(adapter) -> np.ndarray:
    vectors = load(adapter.parent / "full").encode(INPUTS)
    assert (vectors * load(BASE).encode(INPUTS)).sum(axis=1).max() < 0.9
    return vectors


def test_the_adapter_gives_the_vectors_of_weights_merged_by_hand(adapter, expected):
    assert (load(adapter).encode(INPUTS) * expected).sum(axis=1).min() >= 0.99999


def test_saved_again_or_merged_by_the_command_it_gives_the_same(adapter, expected, tmp_path):
    again = load(adapter).save_pretrained(tmp_path / "again")
    assert (load(again).encode(INPUTS) * expected).sum(axis=1).min() >= 0.99999
    done = export(str(adapter), "merged", tmp_path / "merged", num_crops=1)
    assert done.cosine >= 0.99999
    assert not (tmp_path / "merged/adapter_config.json").exists()
    assert (load(tmp_path / "merged").encode(INPUTS) * expected).sum(axis=1).min() >= 0.99999


@pytest.mark.parametrize("inside", ["layers.1.mlp.gate_up_proj", "vision_model.encoder.layers.0.self_attn.out_proj"])
@pytest.mark.parametrize("problem", ["is missing", "was not used"])
def test_a_tensor_that_is_missing_or_left_over_is_named(inside, problem, tmp_path):
    write_adapter(tmp_path / "lora", dora=False)
    state = load_file(tmp_path / "lora/adapter_model.safetensors")
    name = next(name for name in state if f"{inside}.lora_B" in name)
    if problem == "is missing":
        del state[name]
    else:
        state[name.replace(inside, f"{inside}_more")] = torch.zeros(4, RANK)
    save_file(state, tmp_path / "lora/adapter_model.safetensors")
    with pytest.raises(UserError, match=f"{re.escape(inside)}.*lora_B.*{problem}") as caught:
        load(tmp_path / "lora")
    assert "\n" not in str(caught.value)
