"""The checkpoint folder: what is written, and how it becomes the same model again.

`embedder.json` says which base, which settings and how vectors are made; beside it lie either an adapter in PEFT's
layout (`adapter_config.json`, `adapter_model.safetensors`) or all weights (`model.safetensors`).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from vlm2vec.errors import UserError, shown
from vlm2vec.files import replacing
from vlm2vec.models.backbones.base import WEIGHTS_FILE
from vlm2vec.models.checkpoints import adapters
from vlm2vec.models.checkpoints.tensors import load_tensors, read_model

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
        embedding_dim: Length of the vectors. Where the model has more dimensions, these are the first ones.
        normalize: In files of versions before 0.3; vectors always have unit norm.
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

    def content(self) -> dict[str, Any]:
        """The file's JSON, without `head` and `attention` at their defaults: older versions can read it."""
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
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours has its metadata
        return True
    backbone.save_model(folder, state)
    return False


def load_adapter(backbone: Backbone, folder: Path, allow_pickle: bool = False) -> None:
    """Puts a saved adapter on a base model; every tensor of the file must find its place, and every place a tensor.

    Raises:
        UserError: naming the first tensor that is missing, left over or of another shape, or what else of the adapter
            is not supported.
    """
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    path = folder / ADAPTER_FILE
    state = load_tensors(path, folder / adapters.PICKLED_FILE, allow_pickle)
    try:
        if not isinstance(backbone.model, PeftModel):
            config = adapters.read_config(folder)
            state = adapters.fit(state, config, backbone.model, path)
            backbone.model = get_peft_model(backbone.model, config)
        expected = set(get_peft_model_state_dict(backbone.model, save_embedding_layers=False))
        for problem, names in (("was not used", set(state) - expected), ("is missing", expected - set(state))):
            if names:
                raise UserError(
                    f"{path}: tensor {min(names)} {problem} ({len(names)} such tensors); "
                    "the adapter was made for another base or another version of it"
                )
        set_peft_model_state_dict(backbone.model, state)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError) as error:  # of PEFT
        raise UserError(f"{folder}: PEFT cannot put this adapter on {backbone.name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The line of PEFT's or torch's message that names the tensor or setting."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "size mismatch" in line), lines[0])[:240]


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
        backbone.model.load_state_dict(load_tensors(folder / WEIGHTS_FILE))
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / WEIGHTS_FILE}: does not fit the model ({detail})") from error


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a new folder and moves it to `folder`, which is then complete, or as it was before."""
    with replacing(folder) as beside:
        beside.mkdir()
        write(beside)


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
