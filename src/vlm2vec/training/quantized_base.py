"""Frozen weights in 8 or 4 bits under adapters (QLoRA, arXiv 2305.14314), for GPUs with little memory.

"int8": integers with a scale per output. "nf4": 4-bit codes of the normal distribution with a scale per block of 64
weights. Weights are dequantized for each product and again in its backward pass; autograd keeps only the codes. The
gradient is exactly that of a model with the dequantized weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from vlm2vec.errors import UserError
from vlm2vec.models.backbones.base import Backbone
from vlm2vec.models.checkpoints.folder import has_adapter

Bits = Literal["int8", "nf4"]
CPU = torch.device("cpu")
BLOCK = 64
OFFSET = 0.9677083
"""Probability of the largest code of nf4, as in the reference implementation of QLoRA."""


def nf4_codes() -> torch.Tensor:
    """Returns the 16 values of the 4-bit codes in ascending order, from -1 to 1 with an exact 0.

    They are quantiles of the normal distribution: 8 above 0 and 7 below it (QLoRA, section 3).
    """
    above = torch.special.ndtri(torch.linspace(OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    return (values / values.max()).float()


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is dequantized at each use.

    Args:
        plain: The layer to replace.
        bits: Storage format of the weights.
        device: Device of the codes.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    pairs: torch.Tensor

    def __init__(self, plain: nn.Linear, bits: Bits, device: torch.device = CPU) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = plain.in_features, plain.out_features, bits
        weight = plain.weight.detach().to(device)
        self.dtype = weight.dtype
        codes, scales = (_to_int8 if bits == "int8" else _to_nf4)(weight.float())
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        # Each byte of nf4 contains two codes; this table has the pair of values of each byte.
        values = nf4_codes().to(codes.device)
        self.register_buffer("pairs", torch.cartesian_prod(values, values), persistent=False)
        self.bias = None if plain.bias is None else nn.Parameter(plain.bias.detach().to(device), requires_grad=False)

    def expanded(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the dequantized weight [out, in]."""
        if self.bits == "int8":
            return self.codes.to(dtype) * self.scales.to(dtype)
        values = self.pairs.to(dtype).index_select(0, self.codes.int()).view(-1, BLOCK) * self.scales.to(dtype)
        return values.view(-1)[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The dequantized weight, a new tensor; in-place changes have no effect."""
        return self.expanded(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Computes the layer as `nn.Linear` does."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        output: torch.Tensor = _Product.apply(input.to(dtype), self.expanded)  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """Computes input @ weight.T for a frozen weight that is not stored for the backward pass."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: Callable[[torch.dtype], torch.Tensor]) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(given, weight(given.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.weight(gradient.dtype), None


def _to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scales).round().to(torch.int8), scales


def _to_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat = F.pad(weight.reshape(-1), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scales = flat.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    values = nf4_codes().to(weight.device)
    borders = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(flat / scales, borders, out_int32=True).to(torch.uint8).view(-1)
    return codes[0::2] * 16 + codes[1::2], scales


def quantize_base(backbone: Backbone, bits: Bits, device: torch.device = CPU) -> None:
    """Replaces the linear layers of the language model, one after another. Call it before adapters are added.

    The vision encoder keeps its precision: it is a small share of the weights.

    Args:
        backbone: On the CPU or on `device`.
        bits: How weights are kept.
        device: Where layers are quantized and stay.

    Raises:
        UserError: for a base with an adapter, or a model without linear layers in its language model.
    """
    if has_adapter(backbone):
        raise UserError("model.quantize: the base brings an adapter: merge it first (vlm2vec export --to merged)")
    count = 0
    for part in backbone.language_parts():
        for parent in list(part.modules()):
            for name, module in list(parent.named_children()):
                if type(module) is nn.Linear:
                    setattr(parent, name, QuantizedLinear(module, bits, device))
                    count += 1
    if not count:
        raise UserError(f"model.quantize: {backbone.name} has no linear layers in its language model; remove it")
