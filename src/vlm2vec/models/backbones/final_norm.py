"""The setting `final_norm=false`: hidden states before the final norm of a language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm2vec.errors import UserError


def set_final_norm(language_model: Any, used: bool) -> None:
    """Makes the final norm return its input, unless it is used. Its weight stays in the network and in saved folders.

    Args:
        language_model: A decoder of transformers, whose final norm is its module `norm`.
        used: False: hidden states before the norm.

    Raises:
        UserError: for a language model without a module of that name.
    """
    if used:
        return
    if not isinstance(getattr(language_model, "norm", None), nn.Module):
        raise UserError(f"setting final_norm=false: {type(language_model).__name__} has no module norm; remove it")
    language_model.norm.register_forward_hook(_input_of)


def _input_of(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return args[0]
