"""Adapters in PEFT's layout: where one lies, and what its tensors are called in the model that it goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vlm2vec.errors import UserError
from vlm2vec.models.transformers_internals import hub_file, weight_renamings

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
MARKERS = re.compile(r"\.(lora_|modules_to_save|base_layer)")


def find_adapter(source: str, revision: str | None = None) -> Path | None:
    """The folder of an adapter: `source` itself, or where a hub id's adapter was put; None for anything else."""
    folder = Path(source)
    if folder.exists():
        return folder if (folder / CONFIG_FILE).is_file() else None
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        return None  # no hub id
    found = [_from_hub(source, name, revision) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return found[0].parent if found[0] else None


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base model that an adapter names, and its hub revision.

    Raises:
        UserError: if it names none.
    """
    path = folder / CONFIG_FILE
    try:
        about = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not about.get("base_model_name_or_path"):
        raise UserError(f"{path}: base_model_name_or_path is empty; say which base: from_pretrained(..., base=...)")
    return about["base_model_name_or_path"], about.get("revision")


def _from_hub(source: str, name: str, revision: str | None) -> Path | None:
    try:
        return hub_file(source, name, revision)
    except OSError:  # no such repository: whoever loads the base says so
        return None


def rename_keys(state: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Gives an adapter's tensors the names that they have on `model`.

    Adapters were made on other classes (with a language-model head around the model) and by older transformers, whose
    modules had other paths. The paths of modules change as transformers changes them for weights. A name that leads
    to no module of `model` stays as it is, so that whoever loads the adapter can report it.

    Args:
        state: Tensors by name, as saved.
        model: The network without the adapter.
    """
    if not isinstance(model, PreTrainedModel):
        return state  # a network of this project: saved and loaded by the same names
    modules = {name for name, _ in model.named_modules()}
    renamings = weight_renamings(model)
    return {_renamed(key, modules, renamings, f"{model.base_model_prefix}."): value for key, value in state.items()}


def _renamed(key: str, modules: set[str], renamings: list[Any], outer: str) -> str:
    marker = MARKERS.search(key)
    cut = marker.start() if marker else key.rfind(".")
    path, leaf = key[:cut].removeprefix(PREFIX), key[cut:]
    changed = f"{path}.weight"
    for renaming in renamings:
        changed = renaming(changed)
    changed = changed.removesuffix(".weight")
    for candidate in (path, path.removeprefix(outer), changed, changed.removeprefix(outer)):
        if candidate in modules:
            return f"{PREFIX}{candidate}{leaf}"
    return key
