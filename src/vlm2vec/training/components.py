"""The two sides of a vision-language model: the language model, and everything before it (encoder, projector)."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

from vlm2vec.errors import UserError
from vlm2vec.models.backbones.base import Backbone

Towers = Literal["language", "vision", "both"]


def linear_layers(backbone: Backbone, towers: Towers) -> str:
    """A pattern of the full names of all linear layers of these towers, for LoRA.

    Raises:
        UserError: if the model does not say which part is its language model, or a tower has no linear layer.
    """
    inside = {id(module) for part in _language_parts(backbone) for module in part.modules()}
    names = [
        name
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) and (towers == "both" or (id(module) in inside) == (towers == "language"))
    ]
    if not names:
        raise UserError(f"model.towers: {towers}: there is no linear layer to adapt")
    return "|".join(re.escape(name) for name in names)


def freeze_other(backbone: Backbone, towers: Towers) -> None:
    """Freezes what is not in these towers.

    Raises:
        UserError: if the model does not say which part is its language model.
    """
    language = {id(p) for module in _language_parts(backbone) for p in module.parameters()}
    for parameter in backbone.model.parameters():
        if towers != "both" and (id(parameter) in language) != (towers == "language"):
            parameter.requires_grad_(False)


def _language_parts(backbone: Backbone) -> list[nn.Module]:
    if backbone.trained_modules:
        always = ", ".join(["language model", *backbone.trained_modules])
        raise UserError(
            f"model.towers: {backbone.name} always trains {always}; remove model.towers, or name layers in lora.targets"
        )
    try:
        return backbone.language_parts()
    except UserError as error:
        raise UserError(f"model.towers: {error}; remove model.towers, or name layers in lora.targets") from error
