from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm2vec import Embedder, UserError


def changed(source: Path, folder: Path, add: str = "", remove: str = "") -> Path:
    """A copy of a model with a tensor more or less."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    if add:
        state[add] = torch.zeros(2)
    if remove:
        del state[next(name for name in state if name.endswith(remove))]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path) -> Embedder:
    return Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu", like="VLM2Vec/VLM2Vec-V2.0")


def test_the_head_that_is_left_out_on_purpose_is_not_reported(tiny_vlm, caplog, capfd):
    assert "architectures" in json.loads((tiny_vlm("qwen2_vl") / "config.json").read_text())
    load(tiny_vlm("qwen2_vl"))
    assert "lm_head" not in capfd.readouterr().err + caplog.text


def test_weights_without_a_place_are_named_once(tiny_vlm, tmp_path, caplog):
    load(changed(tiny_vlm("qwen2_vl"), tmp_path / "more", add="value_head.weight"))
    (said,) = [record.getMessage() for record in caplog.records if "no place" in record.getMessage()]
    assert said.endswith("more: ignored weights that have no place in the model: value_head.weight")


def test_a_missing_weight_is_an_error(tiny_vlm, tmp_path):
    folder = changed(tiny_vlm("qwen2_vl"), tmp_path / "less", remove="layers.0.mlp.down_proj.weight")
    with pytest.raises(UserError, match=r"weight .*layers\.0\.mlp\.down_proj\.weight is missing"):
        load(folder)
