"""`Dense` layers after the pooling, as sentence-transformers folders have them: frozen, in float32.

Shapes: B examples, D and E input and output dim.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import nn

from vlm2vec.errors import UserError, shown
from vlm2vec.files import write_json
from vlm2vec.models.checkpoints.tensors import load_tensors, read_model

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class DenseFile(BaseModel):
    """Content of the `config.json` of a `Dense` module.

    Attributes:
        in_features: D.
        out_features: E.
        bias: Whether the layer adds one.
        activation_function: Import path of a class of torch. sentence-transformers' default is Tanh.
        module_input_name: Only the vector itself is supported.
        module_output_name: Only the vector itself is supported.
        use_residual: Adds the input to the output, through a second matrix where D and E differ.
    """

    model_config = ConfigDict(extra="forbid")

    in_features: int
    out_features: int
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    module_input_name: Literal["sentence_embedding"] = "sentence_embedding"
    module_output_name: Literal["sentence_embedding"] | None = "sentence_embedding"
    use_residual: bool = False


class Dense(nn.Module):
    """A linear layer with an activation: [B, D] -> [B, E].

    The weights are buffers: they are saved with the model, and never trained or sharded.

    Args:
        about: Its configuration.
        state: `linear.weight` [E, D], and by configuration `linear.bias` [E] and `residual.weight` [E, D].
        activation: Applied to the linear layer's output.
    """

    def __init__(self, about: DenseFile, state: dict[str, torch.Tensor], activation: nn.Module) -> None:
        super().__init__()
        self.about, self.activation = about, activation
        for name in ("linear.weight", "linear.bias", "residual.weight"):
            tensor = state[name].float() if name in state else None
            self.register_buffer(name.replace(".", "_"), tensor)

    def forward(self, vectors_BD: torch.Tensor) -> torch.Tensor:
        """The layer's output in float32, shape [B, E]."""
        weights: Any = self
        output_BE: torch.Tensor = self.activation(F.linear(vectors_BD, weights.linear_weight, weights.linear_bias))
        if not self.about.use_residual:
            return output_BE
        same = weights.residual_weight is None
        return output_BE + (vectors_BD if same else F.linear(vectors_BD, weights.residual_weight))


def read_dense(folder: Path, allow_pickle: bool = False) -> Dense:
    """The layer of a folder that sentence-transformers or `write_dense` wrote.

    Raises:
        UserError: for an unknown key, an activation that is not a class of torch, or tensors of other names or shapes.
    """
    path = folder / CONFIG_FILE
    about = read_model(path, DenseFile)
    state = load_tensors(folder / WEIGHTS_FILE, folder / "pytorch_model.bin", allow_pickle)
    D, E = about.in_features, about.out_features
    expected: dict[str, tuple[int, ...]] = {"linear.weight": (E, D)}
    expected |= {"linear.bias": (E,)} if about.bias else {}
    expected |= {"residual.weight": (E, D)} if about.use_residual and D != E else {}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        raise UserError(f"{folder}: the weights have shapes {found}; {CONFIG_FILE} expects {expected}")
    return Dense(about, state, _activation(path, about.activation_function, E))


def write_dense(dense: Dense, folder: Path) -> None:
    """Writes the layer as sentence-transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    skipped = set() if dense.about.use_residual else {"use_residual"}  # unknown to versions before 5.7
    write_json(folder / CONFIG_FILE, dense.about.model_dump(exclude=skipped))
    state = {
        name.replace("_", ".", 1): tensor.detach().cpu().contiguous() for name, tensor in dense.state_dict().items()
    }
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _activation(path: Path, name: str, width: int) -> nn.Module:
    """The activation of a layer with `width` outputs: a class of torch without weights that keeps the shape."""
    module, _, kind = name.rpartition(".")
    expected = "a class of torch.nn without arguments and weights that keeps the dimension"
    refusal = UserError(f"{path}: activation_function {shown(name)}: expected {expected}")
    if not module.startswith("torch.nn"):
        raise refusal
    try:
        found = getattr(importlib.import_module(module), kind)
        if not issubclass(found, nn.Module):  # nothing else is called
            raise TypeError(name)
        activation: nn.Module = found()
        outputs = activation(torch.zeros(2, width))
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise refusal from error
    keeps_shape = isinstance(outputs, torch.Tensor) and outputs.shape == (2, width)
    if not keeps_shape or activation.state_dict():
        raise refusal
    return activation
