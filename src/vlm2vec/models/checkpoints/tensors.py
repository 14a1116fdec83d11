"""Reads checkpoint files that other programs may have written: JSON with strict checking of keys, and tensors."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from vlm2vec.errors import UserError, expected_in, field_of, shown
from vlm2vec.files import read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
Model = TypeVar("Model", bound=BaseModel)


def read_model(path: Path, kind: type[Model]) -> Model:
    """Reads a JSON file as an object of `kind`; uses the defaults if the file does not exist.

    Raises:
        UserError: for an unknown key or unsupported value; the message names the first one.
    """
    content = read_json(path)
    return checked(path, {} if content is None else content, kind)


def checked(path: Path, content: Any, kind: type[Model]) -> Model:
    """Validates `content` of the file `path` as an object of `kind`.

    Raises:
        UserError: for an unknown key or unsupported value; the message names the first one.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = field_of(first["loc"]) or "content"
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(kind.model_fields))
            detail = f"unknown key {key}; this version supports {known}"
        else:
            given = "" if first["type"] == "missing" else f" {shown(first['input'])}"
            detail = f"{key}{given}: {expected_in(first['msg'])}"
        raise UserError(f"{path}: {detail}") from error


def load_tensors(path: Path, pickled: Path | None = None, allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    """Reads the tensors of a safetensors file, or of a pickled file if allowed.

    Args:
        path: The safetensors file.
        pickled: Fallback if `path` does not exist, read with torch's weights-only loader; None: no fallback.
        allow_pickle: Whether pickled files are accepted.

    Raises:
        UserError: if neither file can be read.
    """
    if pickled is not None and pickled.is_file() and not path.is_file():
        return _load_pickled(pickled, path.name, allow_pickle)
    if not path.is_file():
        raise UserError(f"{path}: not found; expected a safetensors file (pickled weights are not loaded)")
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy it again") from error


def check_weight_files(source: str, allow_pickle: bool) -> None:
    """Checks that a folder has weights other than pickled files.

    Raises:
        UserError: if its only weights are pickled and `allow_pickle` is off.
    """
    folder = Path(source)
    if allow_pickle or not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise UserError(
            f"{folder / pickled[0]}: pickled weights can run code when they are loaded; convert them to safetensors, "
            "or allow them with allow_pickle=True (--allow-pickle)"
        )


def _load_pickled(path: Path, wanted: str, allow_pickle: bool) -> dict[str, torch.Tensor]:
    if not allow_pickle:
        raise UserError(
            f"{path}: pickled weights can run code when they are loaded; convert them to {wanted}, "
            "or allow them with allow_pickle=True (--allow-pickle)"
        )
    try:
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not a readable file of tensors ({str(error).splitlines()[0][:100]})") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{path}: expected a dict of tensors")
    return tensors
