"""Saves and loads the checkpoint folder.

`embedder.json` records the base, its settings and how vectors are computed. The folder also contains either an adapter
in PEFT's layout (`adapter_config.json`, `adapter_model.safetensors`) or all weights (`model.safetensors`).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from vlm2vec.errors import UserError, shown
from vlm2vec.files import replacing
from vlm2vec.models.backbones.base import WEIGHTS_FILE
from vlm2vec.models.checkpoints import adapters
from vlm2vec.models.checkpoints.adapter_weights import check_values, plain_names
from vlm2vec.models.checkpoints.tensors import load_tensors, read_model
from vlm2vec.models.prompts import PromptTemplate

if TYPE_CHECKING:
    from vlm2vec.models.backbones.base import Backbone

EMBEDDER_FILE = "embedder.json"
ADAPTER_FILE = adapters.WEIGHTS_FILE
CONFIG_FILE = "config.json"


class EmbedderFile(BaseModel):
    """Content of `embedder.json`.

    Attributes:
        format: Version of this file.
        base: Built-in name, folder or hub id of the base weights.
        revision: Hub revision of the base.
        options: Settings of the family.
        pooling: See `Backbone.pooling`.
        attention: See `Backbone.attention`.
        embedding_dim: Length of the vectors; smaller than the model's dimension if vectors are truncated.
        normalize: Only in files of versions before 0.3; vectors always have unit norm.
        template: See `PromptTemplate.settings`.
        prompts: See `Embedder.prompts`.
        adapter: Whether the weights are an adapter.
        head: Folders of `Dense` layers after the pooling, in order.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    base: str
    revision: str | None = None
    options: dict[str, Any] = {}
    pooling: str = "last"
    attention: str = "causal"
    embedding_dim: int = Field(ge=1)
    normalize: Annotated[Literal[True], Field(exclude=True)] = True
    template: dict[str, Any] = {}
    prompts: dict[str, str] = {}
    adapter: bool
    head: list[str] = []

    @field_validator("template")
    @classmethod
    def _known_parts(cls, value: dict[str, Any]) -> dict[str, Any]:
        parts = asdict(PromptTemplate())
        for name, part in value.items():
            if name not in parts or type(part) is not type(parts[name]):
                raise ValueError(f"unknown part {shown(name)} or type of its value; expected {', '.join(parts)}")
        return value

    def content(self) -> dict[str, Any]:
        """Returns the JSON content; `head` and `attention` are omitted at their defaults, for older versions."""
        new = self.model_dump(include={"head", "attention"}, exclude_defaults=True)
        return self.model_dump(exclude={"head", "attention"}) | new


def read_embedder_file(folder: Path) -> EmbedderFile:
    """Reads `embedder.json`.

    Raises:
        UserError: if it is not valid, naming the field.
    """
    return read_model(folder / EMBEDDER_FILE, EmbedderFile)


def add_adapter(
    backbone: Backbone, rank: int, alpha: int, dropout: float, targets: list[str] | str | None, dora: bool = False
) -> None:
    """Wraps the backbone's model with LoRA; modules without pretrained weights stay fully trainable.

    If the model already has an adapter with the same settings, training continues that adapter.

    Raises:
        UserError: if the model has an adapter with other settings.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(backbone.model, PeftModel):
        has = backbone.model.peft_config["default"]
        found = {"rank": has.r, "alpha": has.lora_alpha, "dropout": has.lora_dropout, "dora": has.use_dora}
        if targets or found != {"rank": rank, "alpha": alpha, "dropout": dropout, "dora": dora}:
            kind = " ".join(f"lora.{name}={value}" for name, value in found.items())
            raise UserError(
                f"the base has an adapter, and training continues it: set {kind} and neither lora.targets nor "
                "model.components; or merge it first (vlm2vec export --to merged)"
            )
        backbone.model.set_adapter("default")
        return
    with adapters.peft_errors(f"lora: PEFT cannot load this adapter onto {backbone.name}"):
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
    """Returns whether the model has an adapter."""
    from peft import PeftModel

    return isinstance(backbone.model, PeftModel)


def save_weights(backbone: Backbone, folder: Path, state: dict[str, torch.Tensor] | None = None) -> bool:
    """Writes the adapter if there is one, otherwise all weights; returns whether it was an adapter.

    Args:
        backbone: The backbone to save.
        folder: An existing folder.
        state: Weights to write instead of those in memory, if this rank holds only a shard.

    Raises:
        UserError: for a quantized model.
    """
    from peft import PeftModel

    if backbone.quantized:
        raise UserError(
            f"weights quantized to {backbone.quantized} cannot be saved; save the unquantized model and load it with "
            f"quantize={backbone.quantized}"
        )
    if isinstance(backbone.model, PeftModel):
        backbone.model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; `card.py` writes ours
        return True
    backbone.save_model(folder, state)
    return False


def load_adapter(backbone: Backbone, folder: Path, allow_pickle: bool = False) -> None:
    """Loads a saved adapter onto a base model; the file must contain exactly the tensors of the adapter.

    Raises:
        UserError: if a tensor is missing, unexpected, not finite or has another shape, or a setting of the adapter is
            not supported; the message names the first one.
    """
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    path = folder / ADAPTER_FILE
    state = plain_names(load_tensors(path, folder / adapters.PICKLED_FILE, allow_pickle))
    check_values(state, path)
    with adapters.peft_errors(f"{folder}: PEFT cannot load this adapter onto {backbone.name}"):
        if not isinstance(backbone.model, PeftModel):
            config = adapters.read_config(folder)
            state = adapters.fit(state, config, backbone.model, path)
            backbone.model = get_peft_model(backbone.model, config)
        expected = set(get_peft_model_state_dict(backbone.model, save_embedding_layers=False))
        for problem, names in (("was not used", set(state) - expected), ("is missing", expected - set(state))):
            if names:
                raise UserError(
                    f"{path}: tensor {min(names)} {problem} ({len(names)} such tensors); "
                    "the adapter was trained on another base or on another version of the base"
                )
        set_peft_model_state_dict(backbone.model, state)


def merge_adapter(backbone: Backbone) -> None:
    """Merges the adapter into the weights, if there is one; vectors do not change."""
    from peft import PeftModel

    if isinstance(backbone.model, PeftModel):
        merged: Any = backbone.model.merge_and_unload()
        backbone.model = merged


def quantize(backbone: Backbone, to: str) -> None:
    """Quantizes the weights of linear layers to 8-bit integers (torchao); an adapter is merged first.

    Raises:
        UserError: for another format, or if torchao is not installed.
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
    """Loads all weights of a fully fine-tuned model in place.

    Raises:
        UserError: if a tensor is missing, unexpected or has another shape.
    """
    try:
        backbone.model.load_state_dict(load_tensors(folder / WEIGHTS_FILE))
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / WEIGHTS_FILE}: does not fit the model ({detail})") from error


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a temporary folder and renames it to `folder`, which is therefore complete or unchanged."""
    with replacing(folder) as beside:
        beside.mkdir()
        write(beside)


def provenance(**facts: Any) -> dict[str, Any]:
    """Returns versions, git revision and the given facts, to be stored with results."""
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
