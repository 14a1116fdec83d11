"""The checkpoint folder: what is written, and how it becomes the same model again.

`embedder.json` says which base, which settings and how vectors are made; beside it lie either an adapter in PEFT's
layout (`adapter_config.json`, `adapter_model.safetensors`) or all weights (`model.safetensors`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from vlm2vec.errors import UserError, shown
from vlm2vec.models.backbones.base import WEIGHTS_FILE
from vlm2vec.models.checkpoints import adapters

if TYPE_CHECKING:
    from vlm2vec.models.backbones.base import Backbone

EMBEDDER_FILE = "embedder.json"
ADAPTER_FILE = adapters.WEIGHTS_FILE
CONFIG_FILE = "config.json"


class EmbedderFile(BaseModel):
    """Content of `embedder.json`."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    base: str
    revision: str | None = None
    options: dict[str, Any] = {}
    pooling: str = "last"
    attention: str = "causal"
    embedding_dim: int
    normalize: bool = True
    template: dict[str, Any] = {}
    prompts: dict[str, str] = {}
    adapter: bool


def read_embedder_file(folder: Path) -> EmbedderFile:
    """Reads `embedder.json`.

    Raises:
        UserError: if it is not valid, naming the field.
    """
    path = folder / EMBEDDER_FILE
    try:
        return EmbedderFile.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"{path}: {field}: {first['msg']}; the checkpoint is damaged or of a newer version") from error


def add_adapter(
    backbone: Backbone, rank: int, alpha: int, dropout: float, targets: list[str] | str | None, dora: bool = False
) -> None:
    """Wraps the backbone's model with LoRA; parts that were never pretrained stay trainable in full.

    An adapter that the model has already is trained on, if it is of the same kind.

    Raises:
        UserError: if it is not.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(backbone.model, PeftModel):
        has = backbone.model.peft_config["default"]
        found = {"rank": has.r, "alpha": has.lora_alpha, "dropout": has.lora_dropout, "dora": has.use_dora}
        if targets or found != {"rank": rank, "alpha": alpha, "dropout": dropout, "dora": dora}:
            kind = " ".join(f"lora.{name}={value}" for name, value in found.items())
            raise UserError(
                f"the base brings an adapter, which is trained on as it is: set {kind} and neither lora.targets nor "
                "model.components; or merge it first (vlm2vec export --to merged)"
            )
        backbone.model.set_adapter("default")
        return
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets or backbone.lora_targets,
        use_dora=dora,
        modules_to_save=backbone.trained_modules or None,
    )
    backbone.model = get_peft_model(backbone.model, config)


def has_adapter(backbone: Backbone) -> bool:
    """Whether an adapter stands on the model."""
    from peft import PeftModel

    return isinstance(backbone.model, PeftModel)


def save_weights(backbone: Backbone, folder: Path, state: dict[str, torch.Tensor] | None = None) -> bool:
    """Writes the adapter if there is one, else all weights; returns whether it was an adapter.

    Args:
        backbone: Whose weights they are.
        folder: An existing one.
        state: Weights to write instead of those in memory, where these are only a process's part.

    Raises:
        UserError: for a quantised model.
    """
    from peft import PeftModel

    if backbone.quantized:
        raise UserError(
            f"weights kept as {backbone.quantized} are not saved: save the model as it was, and load it with "
            f"quantize={backbone.quantized}"
        )
    if isinstance(backbone.model, PeftModel):
        backbone.model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        return True
    backbone.save_model(folder, state)
    return False


def load_adapter(backbone: Backbone, folder: Path) -> None:
    """Puts a saved adapter on a base model; every tensor of the file must find its place, and every place a tensor.

    Raises:
        UserError: naming the first tensor that is missing or left over, or if the adapter's files are no good.
    """
    from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    state = _load_safetensors(folder / ADAPTER_FILE)
    if not isinstance(backbone.model, PeftModel):
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (ValueError, OSError, TypeError, KeyError) as error:
            raise UserError(f"{folder}: no readable adapter_config.json ({str(error).splitlines()[0]})") from error
        config.base_model_name_or_path = None  # PEFT names the base that it is put on
        state = adapters.rename_keys(state, backbone.model)
        backbone.model = get_peft_model(backbone.model, config)
    expected = set(get_peft_model_state_dict(backbone.model, save_embedding_layers=False))
    for problem, names in (("was not used", set(state) - expected), ("is missing", expected - set(state))):
        if names:
            raise UserError(
                f"{folder / ADAPTER_FILE}: tensor {min(names)} {problem} ({len(names)} such tensors); "
                "the adapter was made for another base or another version of it"
            )
    set_peft_model_state_dict(backbone.model, state)


def merge_adapter(backbone: Backbone) -> None:
    """Works the adapter into the weights, where there is one: the same vectors from a model of its own."""
    from peft import PeftModel

    if isinstance(backbone.model, PeftModel):
        merged: Any = backbone.model.merge_and_unload()
        backbone.model = merged


def quantize(backbone: Backbone, to: str) -> None:
    """Keeps the weights of linear layers as 8-bit integers (torchao); an adapter is merged first.

    Raises:
        UserError: for another format, or where torchao is not installed.
    """
    if to != "int8":
        raise UserError(f"quantize={shown(to)}: expected int8")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError("torchao is not installed: pip install 'vlm2vec[quant]'") from error
    merge_adapter(backbone)
    quantize_(backbone.model, Int8WeightOnlyConfig())
    backbone.quantized = to


def load_weights(backbone: Backbone, folder: Path) -> None:
    """Loads all weights of a fully tuned model in place.

    Raises:
        UserError: naming a tensor that is missing, left over or of another shape.
    """
    try:
        backbone.model.load_state_dict(_load_safetensors(folder / WEIGHTS_FILE))
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / WEIGHTS_FILE}: does not fit the model ({detail})") from error


def write_folder(folder: Path, write: Any) -> None:
    """Calls `write(beside)` on a new folder beside and renames it: `folder` is whole or absent."""
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    beside.mkdir(parents=True)
    try:
        write(beside)
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def provenance(**facts: Any) -> dict[str, Any]:
    """Versions, git revision and the given facts: what one needs to know to trust a number."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    names = ("vlm2vec", "torch", "transformers", "peft", "accelerate", "safetensors", "pillow")
    return {
        "versions": {name: version(name) for name in names},
        "git_revision": git.stdout.strip() if git.returncode == 0 else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **facts,
    }


def write_json(path: Path, content: Any) -> None:
    """Writes JSON beside and renames."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    beside.replace(path)


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: missing; expected a safetensors file (pickled weights are not loaded)")
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy it again") from error
