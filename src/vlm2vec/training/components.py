"""The components of a vision-language model: language model, and everything before it (vision encoder, projector)."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

from vlm2vec.errors import UserError
from vlm2vec.models.backbones.base import Backbone

Components = Literal["language", "vision", "both"]


def linear_layers(backbone: Backbone, components: Components) -> str:
    """Returns a regular expression for the full names of all linear layers of these components, for LoRA.

    Raises:
        UserError: if the backbone does not declare its language model, or a component has no linear layer.
    """
    inside = {id(module) for part in _language_parts(backbone) for module in part.modules()}
    names = [
        name
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear)
        and (components == "both" or (id(module) in inside) == (components == "language"))
    ]
    if not names:
        raise UserError(f"model.components: {components}: the model has no linear layer in this component")
    return "|".join(re.escape(name) for name in names)


def freeze_other(backbone: Backbone, components: Components) -> None:
    """Freezes every parameter outside these components.

    Raises:
        UserError: if the backbone does not declare its language model.
    """
    language = {id(p) for module in _language_parts(backbone) for p in module.parameters()}
    for parameter in backbone.model.parameters():
        if components not in ("both", "language" if id(parameter) in language else "vision"):
            parameter.requires_grad_(False)


def _language_parts(backbone: Backbone) -> list[nn.Module]:
    if backbone.trained_modules:
        always = ", ".join(["language model", *backbone.trained_modules])
        raise UserError(
            f"model.components: {backbone.name} always trains {always}; remove the setting, or set lora.targets"
        )
    try:
        return backbone.language_parts()
    except UserError as error:
        raise UserError(f"model.components: {error}; remove the setting, or name layers in lora.targets") from error
