"""Pooling: hidden states of L tokens -> one vector. Shapes: B examples, L tokens, D embedding dim."""

from __future__ import annotations

import torch


def last_places(mask_BL: torch.Tensor) -> torch.Tensor:
    """Position of the last token of each row that is not padding, shape [B].

    Args:
        mask_BL: 1 for tokens, 0 for padding.
    """
    positions_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    return (mask_BL.bool() * (positions_L + 1)).amax(dim=1) - 1


def last_token(hidden_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """The hidden state of each row's last token that is not padding, on either padding side.

    Args:
        hidden_BLD: Hidden states after the final norm, shape [B, L, D].
        mask_BL: 1 for tokens, 0 for padding, shape [B, L].

    Returns:
        Shape [B, D].
    """
    return hidden_BLD[torch.arange(hidden_BLD.shape[0], device=hidden_BLD.device), last_places(mask_BL)]


def mean(hidden_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """The mean over each row's tokens without padding. Arguments and result as `last_token`."""
    weights_BL1 = mask_BL.unsqueeze(-1).to(hidden_BLD.dtype)
    return (hidden_BLD * weights_BL1).sum(dim=1) / weights_BL1.sum(dim=1).clamp(min=1)


POOLINGS = {"last": last_token, "mean": mean}
