"""The pretrained weights of `compact` that ship with the package, in float16.

The file has the projector, the bypass, the choice of cells, the sentence vectors of the vision encoder's classes, and a
low-rank change of each linear layer of the sentence encoder, which is added when the model is loaded. Its SHA-256 is in
the file beside it, as `sha256sum` writes it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import nn

from vlm2vec.errors import UserError

SHIPPED = Path(__file__).with_name("compact_pretrained.safetensors")
PARTS = ("projector", "bypass", "choice")
"""Modules whose weights the file has as they are."""
SHA256 = ".sha256"
POSITIONS = "projector.positions"
CLASSES = ".vectors_CD"  # at the end of the names of vectors of classes, which a new model has
LORA_A, LORA_B = ".lora_A", ".lora_B"


def shipped_weights() -> dict[str, torch.Tensor]:
    """The tensors of the file by name, in float32.

    Raises:
        UserError: if the file differs from the shipped one.
    """
    raw = SHIPPED.read_bytes()
    if hashlib.sha256(raw).hexdigest() != SHIPPED.with_suffix(SHA256).read_text().split()[0]:
        raise UserError(f"{SHIPPED}: SHA-256 differs from the shipped weights; reinstall vlm2vec")
    return {name: value.float() for name, value in load_safetensors(raw).items()}


@torch.no_grad()
def load_pretrained(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Loads the parts and adds the change of the sentence encoder. Layers that the model lacks are left out.

    The vectors of the places fit a 3 x 3 grid; another grid keeps the words of its places.

    Args:
        model: A `CompactModel`.
        weights: Tensors as `write_pretrained` writes them, without the vectors of the classes.
    """
    own, modules = model.state_dict(), dict(model.named_modules())
    weights = weights | {name: value for name, value in own.items() if name.endswith(CLASSES)}
    if own[POSITIONS].shape != weights[POSITIONS].shape:
        weights = weights | {POSITIONS: own[POSITIONS]}
    for part in PARTS:
        begin = f"{part}."
        modules[part].load_state_dict(
            {name.removeprefix(begin): value for name, value in weights.items() if name.startswith(begin)}
        )
    for name, low_RI in weights.items():
        path = name.removesuffix(LORA_A)
        if path != name and path in modules:
            weight: torch.Tensor = modules[path].weight
            weight += (weights[path + LORA_B] @ low_RI).to(weight.dtype)


def write_pretrained(weights: dict[str, torch.Tensor], path: Path) -> str:
    """Writes tensors in float16, and the SHA-256 of the file beside it; returns it."""
    save_file({name: value.detach().half().contiguous() for name, value in weights.items()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(SHA256).write_text(f"{digest}  {path.name}\n")
    return digest
