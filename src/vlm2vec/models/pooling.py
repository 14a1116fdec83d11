"""Pooling: one vector from the hidden states of L tokens. Shapes: B examples, L tokens, D embedding dim."""

from __future__ import annotations

import torch


def last_places(mask_BL: torch.Tensor) -> torch.Tensor:
    """Position of the last non-padding token of each row, shape [B].

    Args:
        mask_BL: 1 for tokens, 0 for padding.
    """
    positions_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    return (mask_BL.bool() * (positions_L + 1)).amax(dim=1) - 1


def last_token(hidden_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """The hidden state of the last non-padding token of each row. Padding may be on either side.

    Args:
        hidden_BLD: Hidden states after the final norm, shape [B, L, D].
        mask_BL: 1 for tokens, 0 for padding, shape [B, L].

    Returns:
        Shape [B, D].
    """
    return hidden_BLD[torch.arange(hidden_BLD.shape[0], device=hidden_BLD.device), last_places(mask_BL)]


def mean(hidden_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """The mean over the non-padding tokens of each row. Arguments and result as in `last_token`."""
    weights_BL1 = mask_BL.unsqueeze(-1).to(hidden_BLD.dtype)
    return (hidden_BLD * weights_BL1).sum(dim=1) / weights_BL1.sum(dim=1).clamp(min=1)


POOLINGS = {"last": last_token, "mean": mean}
