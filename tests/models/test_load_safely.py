"""Loading a checkpoint never runs code or unpickles without permission, and rejects unknown quantizations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny.models import draw_image

from vlm2vec import Embedder, UserError

INPUTS = ["a dog", {"image": draw_image(40, 30, 1)}, {"image": draw_image(33, 41, 2), "text": "what?"}]


def load(folder: Path, **settings: Any) -> Embedder:
    return Embedder.from_pretrained(str(folder), dtype=torch.float32, **settings)


def test_pickled_weights_are_loaded_only_where_allowed(tiny_vlm, tmp_path):
    source = tiny_vlm("llava")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model.bin: pickled weights.*--allow-pickle"):
        load(tmp_path)
    allowed = load(tmp_path, allow_pickle=True)
    np.testing.assert_allclose(allowed.encode(INPUTS), load(source).encode(INPUTS), atol=1e-6)
    allowed.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").backbone.options() == {}


def test_code_of_a_checkpoint_is_not_run(tiny_vlm, tmp_path):
    for file in tiny_vlm("llava").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "config.json"
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **code}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_quantisation_is_refused_and_a_missing_library_named(tiny_vlm):
    with pytest.raises(UserError, match="expected int8"):
        load(tiny_vlm("llava"), quantize="int3")
