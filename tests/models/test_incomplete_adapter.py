"""An adapter's file without the weights of some layers that its configuration names is an error, not a half adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_adapter_kinds import LANGUAGE, OPTIONS, write_adapter

from vlm2vec import Embedder, UserError

TinyVlm = Callable[[str], Path]
WEIGHTS = "adapter_model.safetensors"
KINDS = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "pattern": {"target_modules": LANGUAGE},
    "all-linear": OPTIONS["all-linear"],
    "dora": OPTIONS["dora"],
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def without(folder: Path, target: Path, part: str) -> Path:
    """A copy of an adapter whose file lacks the tensors with a part in their names."""
    shutil.copytree(folder, target)
    state = load_file(target / WEIGHTS)
    kept = {name: tensor for name, tensor in state.items() if part not in name}
    assert 0 < len(kept) < len(state)
    save_file(kept, target / WEIGHTS)
    return target


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_file_without_the_weights_of_a_layer_is_one_line(
    family: str, name: str, tiny_vlm: TinyVlm, tmp_path: Path
) -> None:
    write_adapter(tiny_vlm(family), tmp_path / "whole", KINDS[name], "CAUSAL_LM")
    half = without(tmp_path / "whole", tmp_path / "half", ".layers.1.")
    with pytest.raises(UserError) as error:
        Embedder.from_pretrained(half, device="cpu")
    assert "\n" not in str(error.value)
    assert WEIGHTS in str(error.value) and "layers.1." in str(error.value)
    assert "has no weights for" in str(error.value) and "incomplete" in str(error.value)


def test_a_kind_of_module_that_is_listed_and_absent_in_all_layers_is_one_line(
    tiny_vlm: TinyVlm, tmp_path: Path
) -> None:
    write_adapter(tiny_vlm("qwen2_vl"), tmp_path / "whole", KINDS["list"], "CAUSAL_LM")
    half = without(tmp_path / "whole", tmp_path / "half", ".v_proj.")
    with pytest.raises(UserError, match=r"has no weights for language_model\.layers\.0\.self_attn\.v_proj and 1 more"):
        Embedder.from_pretrained(half, device="cpu")


def test_a_layer_that_the_configuration_leaves_out_needs_no_weights(tiny_vlm: TinyVlm, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}
    write_adapter(tiny_vlm("qwen2_vl"), tmp_path / "first", options, "CAUSAL_LM")
    assert len(Embedder.from_pretrained(tmp_path / "first", device="cpu").encode(["a cat"])) == 1
