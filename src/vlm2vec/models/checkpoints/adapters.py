"""Finds adapters in PEFT's layout and adjusts their configuration and tensors to a model."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vlm2vec.errors import UserError, shown
from vlm2vec.files import read_object
from vlm2vec.models.checkpoints.adapter_weights import check_targets
from vlm2vec.models.transformers_internals import hub_file, weight_renamings

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
PICKLED_FILE = "adapter_model.bin"
MARKERS = re.compile(r"\.(lora_|modules_to_save|base_layer|token_adapter|trainable_tokens)")
NOT_PER_INPUT = ("LILY", "POLY", "XLORA")
"""Kinds whose weights depend on the other inputs of a batch or on arguments of the call."""
HEADS = ("lm_head", "score", "classifier")  # modules outside the network whose hidden states are pooled
logger = logging.getLogger(__name__)


@contextmanager
def peft_errors(what: str) -> Iterator[None]:
    """Turns what PEFT or torch raises for a setting or tensor into one line.

    Args:
        what: Begins the message: the object, and what could not be done with it.

    Raises:
        UserError: with the line of the message that names the setting or tensor.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, OSError, re.error) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if "size mismatch" in line), lines[0])[:240]
        raise UserError(f"{what}: {reason}") from error


def find_adapter(source: str, revision: str | None = None) -> Path | None:
    """Returns the folder of an adapter: `source` itself, or the local copy of a hub id's adapter; None otherwise."""
    folder = Path(source)
    if folder.exists():
        return folder if (folder / CONFIG_FILE).is_file() else None
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        return None  # not a hub id
    config = _from_hub(source, CONFIG_FILE, revision)
    if config is not None and _from_hub(source, WEIGHTS_FILE, revision) is None:
        _from_hub(source, PICKLED_FILE, revision)  # it is loaded only with allow_pickle
    return config.parent if config else None


def base_of(folder: Path) -> tuple[str, str | None]:
    """Returns the base model named in an adapter's configuration, and its hub revision.

    Raises:
        UserError: if the configuration names no base.
    """
    path = folder / CONFIG_FILE
    about = read_object(path)
    base, revision = about.get("base_model_name_or_path"), about.get("revision")
    if not base:
        raise UserError(f"{path}: base_model_name_or_path is empty; pass the base: from_pretrained(..., base=...)")
    if not isinstance(base, str) or not isinstance(revision, str | None):
        raise UserError(f"{path}: expected texts as base_model_name_or_path and revision, found {shown(base)}")
    return base, revision


def _from_hub(source: str, name: str, revision: str | None) -> Path | None:
    try:
        return hub_file(source, name, revision)
    except OSError:  # no such repository; loading the base raises the error
        return None


def read_config(folder: Path) -> Any:
    """Reads an adapter's PEFT configuration and adapts it to a model without a head and without generation.

    Raises:
        UserError: if PEFT cannot read it or does not know one of its settings, if the adapter changes inputs instead of
            weights (such as prompt tuning), or if its weights depend on more than the input.
    """
    from peft import PeftConfig

    path = folder / CONFIG_FILE
    with peft_errors(f"{path} is not readable"):
        config: Any = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning or config.peft_type in NOT_PER_INPUT:
        raise UserError(f"{path}: peft_type {config.peft_type.value} is not supported; expected LORA")
    known = {field.name for field in dataclasses.fields(config)}
    # Earlier versions of PEFT had settings that are gone, but nobody can have used those that are null or false.
    if unknown := sorted(name for name, value in read_object(path).items() if value and name not in known):
        raise UserError(
            f"{path}: unknown key {unknown[0]}, which may change the weights; update peft "
            f"(this adapter was saved by version {config.peft_version or 'unknown'})"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise UserError(
            f"{folder / CONFIG_FILE}: alora_invocation_tokens is not supported: it limits the adapter to the "
            "tokens after an invocation; expected an adapter of all tokens"
        )
    config.base_model_name_or_path = None  # PEFT fills in the actual base
    config.task_type = None  # it selects a wrapper for a class with a head
    return config


def fit(state: dict[str, torch.Tensor], config: Any, model: Any, path: Path) -> dict[str, torch.Tensor]:
    """Renames an adapter's tensors to the module names of `model`, and changes `config` to match.

    Adapters may come from other classes (with a language-model head around the model) and from older versions of
    transformers with other module paths. Paths are renamed by the rules that transformers applies to weights. Tensors
    of heads are dropped, since they cannot change a vector. A name that matches no module of `model` is kept, so that
    loading can report it.

    Args:
        state: Tensors by name, as saved.
        config: PEFT's configuration; changed in place.
        model: The network without the adapter.
        path: The adapter's file, for messages.

    Raises:
        UserError: for saved input embeddings that differ from the base's, and for a file without the weights of some
            layers that the configuration names, or with weights of others.
    """
    if not isinstance(model, PreTrainedModel):
        return state  # this project's own networks are saved and loaded with the same names
    modules = dict(model.named_modules())
    rename = _Renaming(set(modules), weight_renamings(model), f"{model.base_model_prefix}.")
    found = {rename.key(key): value for key, value in state.items()}
    heads = {key for key in found if _path(key).rpartition(".")[2] in HEADS and _path(key) not in modules}
    if heads:
        logger.info("%s: %d tensors of %s are not used: they cannot change a vector", path, len(heads), min(heads))
    saved = {name.rpartition(".")[2] for name in getattr(config, "modules_to_save", None) or ()}
    plain = {name: module for name, module in modules.items() if name.rpartition(".")[2] not in saved}
    same = heads | {key for key, value in found.items() if _is_base_embedding(key, value, plain, path)}
    found = {key: value for key, value in found.items() if key not in same}
    if set(found) != set(state):
        saved_as = {_path(rename.key(key)): _path(key) for key in state if ".lora_" in key}
        check_targets(config, saved_as, modules, path)
        _fit_config(config, found, rename)
    return found


def _fit_config(config: Any, state: Iterable[str], rename: _Renaming) -> None:
    """Replaces patterns in the configuration by the explicit paths of the adapted modules."""
    adapted = {_path(key) for key in state if ".lora_" in key}
    # Names of parameters and of modules cannot be told apart in the tensors, so those are kept as they were saved.
    if adapted and hasattr(config, "layers_to_transform") and not getattr(config, "target_parameters", None):
        config.target_modules, config.exclude_modules = sorted(adapted), None
        config.layers_to_transform = config.layers_pattern = None
    if getattr(config, "modules_to_save", None):
        kept = [name for name in config.modules_to_save if name.rpartition(".")[2] not in HEADS]
        config.modules_to_save = [rename.path(name) for name in kept] or None
    for name in ("rank_pattern", "alpha_pattern"):
        given: Mapping[str, Any] = getattr(config, name, None) or {}
        if given:
            setattr(config, name, {rename.path(pattern): value for pattern, value in given.items()})
    if isinstance(tokens := getattr(config, "trainable_token_indices", None), dict):
        kept = [module for module in tokens if module.rpartition(".")[2] not in HEADS]
        config.trainable_token_indices = {rename.path(module): tokens[module] for module in kept} or None


def _path(key: str) -> str:
    """Returns the module path in a tensor's name."""
    marker = MARKERS.search(key)
    return key[: marker.start() if marker else key.rfind(".")].removeprefix(PREFIX)


def _is_base_embedding(key: str, value: torch.Tensor, modules: Mapping[str, Any], path: Path) -> bool:
    """Returns whether a tensor is the base's input embedding, which PEFT saves together with adapters."""
    leaf = key.removeprefix(PREFIX + _path(key))
    embedding = modules.get(_path(key))
    if leaf not in (".weight", ".base_layer.weight") or not isinstance(embedding, torch.nn.Embedding):
        return False
    weight = embedding.weight.detach()
    if weight.shape != value.shape or not torch.equal(weight, value.to(weight)):
        raise UserError(
            f"{path}: tensor {key} of shape {tuple(value.shape)} changes the base's input embeddings "
            f"{tuple(weight.shape)}, which is not supported; merge the adapter into its base with PEFT first"
        )
    return True


class _Renaming:
    """Maps saved module names to those of a model.

    Args:
        modules: Paths of the model's modules.
        renamings: Renaming rules of transformers for weights.
        outer: Prefix of the model inside the class with a head.
    """

    def __init__(self, modules: set[str], renamings: list[Any], outer: str) -> None:
        self.modules, self.renamings, self.outer = modules, renamings, outer

    def path(self, path: str) -> str:
        """Returns the model's name of a module; unchanged if the model has no such module."""
        changed = f"{path}.weight"
        for renaming in self.renamings:
            changed = renaming(changed)
        changed = changed.removesuffix(".weight")
        for candidate in (path, path.removeprefix(self.outer), changed, changed.removeprefix(self.outer)):
            if candidate in self.modules:
                return candidate
        return path

    def key(self, key: str) -> str:
        """Returns the model's name of a tensor, which may be in a module of PEFT's below the adapted one."""
        path = _path(key)
        for outer in (path, path.rpartition(".")[0]):
            if outer and (found := self.path(outer)) in self.modules:
                return f"{PREFIX}{found}{key.removeprefix(PREFIX).removeprefix(outer)}"
        return key
