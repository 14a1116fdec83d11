"""The two sides of a vision-language model: the language model, and everything before it (encoder, projector)."""

from __future__ import annotations

import re
from typing import Any, Literal

from torch import nn

from vlm2vec.errors import UserError

Towers = Literal["language", "vision", "both"]


def linear_layers(model: Any, towers: Towers) -> str:
    """A pattern of the full names of all linear layers of these towers, for LoRA.

    Raises:
        UserError: if the model does not say which part is its language model, or a tower has no linear layer.
    """
    inside = _language_modules(model)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (towers == "both" or (id(module) in inside) == (towers == "language"))
    ]
    if not names:
        raise UserError(f"model.towers: {towers}: there is no linear layer to adapt")
    return "|".join(re.escape(name) for name in names)


def freeze_other(model: Any, towers: Towers) -> None:
    """Freezes what is not in these towers.

    Raises:
        UserError: if the model does not say which part is its language model.
    """
    language = {id(p) for module in _language_parts(model) for p in module.parameters()}
    for parameter in model.parameters():
        if towers != "both" and (id(parameter) in language) != (towers == "language"):
            parameter.requires_grad_(False)


def _language_modules(model: Any) -> set[int]:
    return {id(module) for part in _language_parts(model) for module in part.modules()}


def _language_parts(model: Any) -> list[nn.Module]:
    if not hasattr(model, "get_decoder"):
        raise UserError("model.towers: this family's towers cannot be told apart; name layers in lora.targets")
    return [model.get_decoder(), model.get_input_embeddings()]
