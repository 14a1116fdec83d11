"""An adapter's file without the weights of some layers that its configuration names is an error, not a half adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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


def test_a_listed_kind_of_a_component_without_an_adapter_is_not_missed(tiny_vlm: TinyVlm, tmp_path: Path) -> None:
    """`out_proj` stands in the vision encoder alone, which this adapter was not trained with."""
    write_adapter(tiny_vlm("llava"), tmp_path / "whole", {"target_modules": LANGUAGE}, "CAUSAL_LM")
    changed(tmp_path / "whole", target_modules=["q_proj", "v_proj", "out_proj"])
    assert len(Embedder.from_pretrained(tmp_path / "whole", device="cpu").encode(["a cat"])) == 1


@pytest.mark.parametrize(
    "change", [{"target_modules": ["q_proj"]}, {"target_modules": "k_proj"}, {"layers_to_transform": [0]}]
)
def test_weights_that_the_configuration_does_not_name_are_one_line(
    change: dict[str, Any], tiny_vlm: TinyVlm, tmp_path: Path
) -> None:
    write_adapter(tiny_vlm("qwen2_vl"), tmp_path / "whole", KINDS["list"], "CAUSAL_LM")
    changed(tmp_path / "whole", **change)
    with pytest.raises(UserError, match=r"has weights for .* which target_modules of .* does not name"):
        Embedder.from_pretrained(tmp_path / "whole", device="cpu")


def changed(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewritten(folder: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    state = load_file(folder / WEIGHTS)
    save_file(dict(change(name, tensor) for name, tensor in state.items()), folder / WEIGHTS)


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: f"module.{name}",
        lambda name: name.replace("model.model.", "model._orig_mod.model."),
    ],
    ids=["PEFT's state dict", "DDP", "torch.compile"],
)
def test_names_of_wrapped_models_give_the_same_vectors(
    renamed: Callable[[str], str], tiny_vlm: TinyVlm, tmp_path: Path
) -> None:
    write_adapter(tiny_vlm("qwen2_vl"), tmp_path / "a", OPTIONS["dora"], "CAUSAL_LM")
    expected = Embedder.from_pretrained(tmp_path / "a", device="cpu").encode(["a cat"])
    rewritten(tmp_path / "a", lambda name, tensor: (renamed(name), tensor))
    np.testing.assert_array_equal(Embedder.from_pretrained(tmp_path / "a", device="cpu").encode(["a cat"]), expected)


def test_values_that_are_no_weights_are_one_line_and_an_untrained_adapter_is_said(
    tiny_vlm: TinyVlm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, change, message in (
        ("nan", lambda tensor: tensor.fill_(torch.nan), "has NaN or Inf; the training has diverged"),
        ("int8", lambda tensor: tensor.to(torch.int8), r"of type torch\.int8: expected floating-point numbers"),
    ):
        write_adapter(tiny_vlm("qwen2_vl"), tmp_path / name, OPTIONS["plain"], "CAUSAL_LM")
        rewritten(tmp_path / name, lambda name, tensor, change=change: (name, change(tensor)))
        with pytest.raises(UserError, match=message):
            Embedder.from_pretrained(tmp_path / name, device="cpu")
    write_adapter(tiny_vlm("qwen2_vl"), tmp_path / "zero", OPTIONS["plain"], "CAUSAL_LM")
    rewritten(tmp_path / "zero", lambda name, tensor: (name, tensor * ("lora_B" not in name)))
    Embedder.from_pretrained(tmp_path / "zero", device="cpu")
    assert "the adapter changes nothing, because all its lora_B are 0" in caplog.text


def test_a_run_with_a_checkpoint_inside_and_a_weight_of_another_shape_are_named(
    tiny_vlm: TinyVlm, tmp_path: Path
) -> None:
    shutil.copytree(tiny_vlm("qwen2_vl"), tmp_path / "run/checkpoint-5")
    with pytest.raises(UserError, match=r"run: not a checkpoint; .*; there is one in .*run/checkpoint-5"):
        Embedder.from_pretrained(tmp_path / "run")
    weights = tmp_path / "run/checkpoint-5/model.safetensors"
    state = {
        name: t[:-1] if name.endswith("0.self_attn.q_proj.weight") else t for name, t in load_file(weights).items()
    }
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weight .*q_proj\.weight has the shape \[31, 32\]: expected \[32, 32\]"):
        Embedder.from_pretrained(tmp_path / "run/checkpoint-5")


def test_a_layer_that_the_configuration_leaves_out_needs_no_weights(tiny_vlm: TinyVlm, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}
    write_adapter(tiny_vlm("qwen2_vl"), tmp_path / "first", options, "CAUSAL_LM")
    assert len(Embedder.from_pretrained(tmp_path / "first", device="cpu").encode(["a cat"])) == 1
