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


def first_token(hidden_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """The hidden state of each row's first token that is not padding. Arguments and result as `last_token`."""
    first_B = mask_BL.int().argmax(dim=1)
    return hidden_BLD[torch.arange(hidden_BLD.shape[0], device=hidden_BLD.device), first_B]


def maximum(hidden_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """The maximum of each dimension over a row's tokens. Arguments and result as `last_token`."""
    return hidden_BLD.masked_fill(~mask_BL.bool().unsqueeze(-1), float("-inf")).amax(dim=1)


def mean_sqrt_len(hidden_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """The sum over a row's tokens, divided by the square root of their number. Arguments and result as `last_token`."""
    return mean(hidden_BLD, mask_BL) * mask_BL.sum(dim=1, keepdim=True).clamp(min=1).to(hidden_BLD.dtype).sqrt()


def weighted_mean(hidden_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """The mean with weights 1, 2, 3 ... from a row's first token (SGPT). Arguments and result as `last_token`."""
    weights_BL1 = (mask_BL.cumsum(dim=1) * mask_BL).unsqueeze(-1).float()
    total_BD = (hidden_BLD.float() * weights_BL1).sum(dim=1)
    return (total_BD / weights_BL1.sum(dim=1).clamp(min=1)).to(hidden_BLD.dtype)


# Those of sentence-transformers under its names, except "lasttoken", which is "last" here.
POOLINGS = {
    "last": last_token,
    "mean": mean,
    "cls": first_token,
    "max": maximum,
    "mean_sqrt_len_tokens": mean_sqrt_len,
    "weightedmean": weighted_mean,
}
JOIN = "+"


def pool(names: str, hidden_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """One pooling, or several joined by "+", whose vectors are concatenated in order.

    Args:
        names: Keys of `POOLINGS`, such as "last" or "mean+last".
        hidden_BLD: Hidden states after the final norm, shape [B, L, D].
        mask_BL: 1 for tokens, 0 for padding, shape [B, L].

    Returns:
        Shape [B, P * D] for P poolings.
    """
    return torch.cat([POOLINGS[name](hidden_BLD, mask_BL) for name in names.split(JOIN)], dim=-1)
