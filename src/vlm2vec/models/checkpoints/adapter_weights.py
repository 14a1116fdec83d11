"""Checks the tensors of an adapter: names, values, and whether they are those that its configuration names."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch

from vlm2vec.errors import UserError

logger = logging.getLogger(__name__)
LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of a layer in a path; # stands for it in the path of a kind of module."""
ADAPTABLE = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
WRAPPED = re.compile(
    r"^module\.|(?<![^.])_orig_mod\.|(?<=[._]lora_[AB])\.default(?=\.)|(?<=lora_magnitude_vector)\.default(?=\.)"
)
"""Parts of names that a state dict has of DDP, of torch.compile and of PEFT, where PEFT did not save it itself."""


def plain_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by the names that PEFT saves: state dicts of wrapped models have further parts in theirs."""
    return {WRAPPED.sub("", name): tensor for name, tensor in state.items()}


def check_values(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Checks that the tensors are finite floating-point numbers, and warns of an adapter that changes nothing.

    Raises:
        UserError: naming the first tensor that is not.
    """
    for name, tensor in state.items():
        if "lora_" in name and not tensor.is_floating_point():
            raise UserError(f"{path}: tensor {name} of type {tensor.dtype}: expected floating-point numbers")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{path}: tensor {name} has NaN or Inf; the training has diverged: use an earlier checkpoint"
            )
    second = [tensor for name, tensor in state.items() if re.search("lora_(embedding_)?B", name)]
    if second and not any(tensor.any() for tensor in second):
        logger.warning("%s: the adapter changes nothing, because all its lora_B are 0: it is not trained", path)


def check_targets(config: Any, saved_as: Mapping[str, str], modules: Mapping[str, Any], path: Path) -> None:
    """Checks that the file has the weights of all modules that the configuration names, and of no others.

    PEFT would leave a module without weights as it is in the base, and ignore weights of a module that is not named.
    Weights for modules that the network does not have are left to `load_adapter`.

    Args:
        config: PEFT's configuration, with the names of the class that was trained.
        saved_as: Name in the file of each module of the network that the file has weights for.
        modules: Modules of the network.
        path: The file, for messages.

    Raises:
        UserError: naming the first module.
    """
    where = "target_modules of adapter_config.json"
    if lacking := _lacking(config, saved_as, modules):
        raise UserError(
            f"{path}: has no weights for {_first(lacking)}, which {where} names; "
            "the file is incomplete: download or save the adapter again"
        )
    if unnamed := _unnamed(config, {ours: theirs for ours, theirs in saved_as.items() if ours in modules}):
        raise UserError(
            f"{path}: has weights for {_first(unnamed)}, which {where} does not name; "
            "the two files are not of one adapter: download or save it again"
        )


def _first(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _unnamed(config: Any, saved_as: Mapping[str, str]) -> list[str]:
    """Modules that an adapter's file has weights for and its configuration does not name."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if not config.target_modules or config.target_modules == "all-linear":
        return []
    return sorted(ours for ours, theirs in saved_as.items() if not check_target_module_exists(config, theirs))


def _lacking(config: Any, saved_as: Mapping[str, str], modules: Mapping[str, Any]) -> list[str]:
    """Modules that an adapter's configuration names and its file has no weights for.

    A module is compared with those of other layers that the file has, because the patterns of the configuration are for
    the names of the class that was trained. A kind of module that is absent in all layers counts if it is listed by
    name and its component (vision encoder, language model) has an adapter: the base may have more components than the
    model that was trained.

    Args:
        config: See `check_targets`.
        saved_as: See `check_targets`.
        modules: See `check_targets`.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    wanted = config.target_modules
    if not wanted or not saved_as:
        return []
    kinds = {LAYER.sub("#", ours): LAYER.sub("#", theirs) for ours, theirs in saved_as.items()}
    components = {path.partition(".")[0] for path in saved_as}
    listed = () if isinstance(wanted, str) else wanted
    absent = [name for name in listed if not any(_ends(path, name) for path in saved_as.values())]
    lacking = []
    for path in sorted(set(modules) - set(saved_as)):
        if not isinstance(modules[path], ADAPTABLE):
            continue
        pieces = zip_longest(kinds.get(LAYER.sub("#", path), "").split("#"), LAYER.findall(path), fillvalue="")
        theirs = "".join(chain.from_iterable(pieces))
        known = LAYER.sub("#", path) in kinds and (wanted == "all-linear" or check_target_module_exists(config, theirs))
        listed_here = path.partition(".")[0] in components and any(_ends(path, name) for name in absent)
        if known or listed_here:
            lacking.append(path)
    return lacking


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
