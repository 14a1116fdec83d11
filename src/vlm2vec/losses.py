"""Contrastive losses: pure functions of tensors that know no model and no process group.

Each takes the rows that this process answers for (its queries) against all columns (the targets of every process) and
works through them in blocks: its memory grows with B + M, never with B x M.

Shapes: B queries, M targets, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

BLOCK_LOGITS = 2**22
"""Cosines of a block at most: 16 MiB in float32."""


@dataclass
class Exclusions:
    """Which targets are no negatives of which queries, without a B x M matrix. The positive itself always counts.

    Attributes:
        keys: Pairs of integers by query [B] and by target [M]; where any pair is equal, the target is left out.
        margin: A target whose cosine exceeds the positive's by more than this is taken for a second positive and left
            out; None: none is.
    """

    keys: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    margin: float | None = None

    def block(
        self, rows: slice, cosines_bM: torch.Tensor, positive_b1: torch.Tensor, is_positive_bM: torch.Tensor
    ) -> torch.Tensor:
        """True where a target of these rows is left out, shape [b, M]."""
        out_bM = torch.zeros_like(is_positive_bM)
        for of_query_B, of_target_M in self.keys:
            out_bM |= of_query_B[rows, None] == of_target_M[None, :]
        if self.margin is not None:
            out_bM |= cosines_bM > positive_b1 + self.margin
        return out_bM & ~is_positive_bM


def info_nce(
    queries_BD: torch.Tensor,
    targets_MD: torch.Tensor,
    target_index_B: torch.Tensor,
    temperature: float | torch.Tensor = 0.02,
    exclusions: Exclusions | None = None,
    block_logits: int = BLOCK_LOGITS,
) -> torch.Tensor:
    """Mean cross entropy of each query's positive among all targets of the batch.

    loss = mean_b( -log( exp(q_b . t_pos(b) / temperature) / sum_m exp(q_b . t_m / temperature) ) )

    Source: VLM2Vec (arXiv 2410.05160), equation 1; temperature 0.02 as trained there.

    Args:
        queries_BD: Unit-norm query vectors, shape [B, D].
        targets_MD: Unit-norm target vectors, shape [M, D]; positives and negatives in any order.
        target_index_B: Row of each query's positive in `targets_MD`, shape [B].
        temperature: Divides the cosine; smaller is sharper. Above 0. A tensor is learned.
        exclusions: Targets that must not count as a query's negatives.
        block_logits: Cosines that are in memory at once, about; any number gives the same loss.

    Returns:
        A scalar in float32.

    Raises:
        ValueError: if the temperature is not above 0.
    """
    if not isinstance(temperature, torch.Tensor) and temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    rule = exclusions or Exclusions()

    def block(
        rows: slice, cosines_bM: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        index_b1 = target_index_B[rows, None]
        positive_b1 = cosines_bM.gather(1, index_b1)
        is_positive_bM = torch.zeros_like(cosines_bM, dtype=torch.bool).scatter_(1, index_b1, True)
        out_bM = rule.block(rows, cosines_bM, positive_b1, is_positive_bM)
        logits_bM = (cosines_bM * scale).masked_fill(out_bM, float("-inf"))
        log_p_bM = F.log_softmax(logits_bM, dim=1)
        slope_bM = log_p_bM.exp() - is_positive_bM.float()
        return -log_p_bM.gather(1, index_b1).sum(), slope_bM, (slope_bM * cosines_bM).sum(), slope_bM.sum()

    return _in_blocks(block, queries_BD, targets_MD, 1 / _scalar(temperature, queries_BD), None, block_logits)


def sigmoid_loss(
    queries_BD: torch.Tensor,
    targets_MD: torch.Tensor,
    target_index_B: torch.Tensor,
    temperature: float | torch.Tensor = 0.1,
    bias: float | torch.Tensor = -10.0,
    exclusions: Exclusions | None = None,
    block_logits: int = BLOCK_LOGITS,
) -> torch.Tensor:
    """Each pair of a query and a target is one yes-or-no question: SigLIP's loss, summed over targets, mean of queries.

    loss = mean_b sum_m -log sigmoid( z_bm (q_b . t_m / temperature + bias) ), z = 1 for the positive, else -1

    Source: SigLIP (arXiv 2303.15343), equation 2; temperature 1/10 and bias -10 are its initial values, both learned.

    Args:
        queries_BD: Unit-norm query vectors, shape [B, D].
        targets_MD: Unit-norm target vectors, shape [M, D].
        target_index_B: Row of each query's positive in `targets_MD`, shape [B].
        temperature: Divides the cosine. Above 0. A tensor is learned.
        bias: Added to every logit. A tensor is learned.
        exclusions: Pairs that are not asked about.
        block_logits: As in `info_nce`.

    Returns:
        A scalar in float32.
    """
    rule = exclusions or Exclusions()

    def block(
        rows: slice, cosines_bM: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        index_b1 = target_index_B[rows, None]
        is_positive_bM = torch.zeros_like(cosines_bM, dtype=torch.bool).scatter_(1, index_b1, True)
        out_bM = rule.block(rows, cosines_bM, cosines_bM.gather(1, index_b1), is_positive_bM)
        sign_bM = is_positive_bM.float() * 2 - 1
        signed_bM = sign_bM * (cosines_bM * scale + shift)
        value = -F.logsigmoid(signed_bM).masked_fill(out_bM, 0).sum()
        slope_bM = (-sign_bM * torch.sigmoid(-signed_bM)).masked_fill(out_bM, 0)
        return value, slope_bM, (slope_bM * cosines_bM).sum(), slope_bM.sum()

    scale = 1 / _scalar(temperature, queries_BD)
    return _in_blocks(block, queries_BD, targets_MD, scale, _scalar(bias, queries_BD), block_logits)


def matryoshka(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    queries_BD: torch.Tensor,
    targets_MD: torch.Tensor,
    dims: Sequence[int],
) -> torch.Tensor:
    """The mean of a loss over vectors cut to their first dimensions and normalised again.

    Source: Matryoshka representation learning (arXiv 2205.13147), equal weights.

    Args:
        loss: Of unit-norm queries and targets.
        queries_BD: Shape [B, D].
        targets_MD: Shape [M, D].
        dims: Lengths to train at, each at most D.
    """
    parts = [loss(F.normalize(queries_BD[:, :dim], dim=-1), F.normalize(targets_MD[:, :dim], dim=-1)) for dim in dims]
    return torch.stack(parts).mean()


Block = Callable[
    [slice, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
]
"""(rows, cosines, scale, bias) -> loss of the rows, its slope by logit, and the slopes by scale and by bias."""


def _scalar(value: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.float() if isinstance(value, torch.Tensor) else torch.tensor(value, device=like.device)


def _in_blocks(
    block: Block,
    queries_BD: torch.Tensor,
    targets_MD: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    block_logits: int,
) -> torch.Tensor:
    bias = torch.zeros((), device=queries_BD.device) if bias is None else bias
    value: torch.Tensor = _Blocks.apply(  # type: ignore[no-untyped-call]
        block, queries_BD.float(), targets_MD.float(), scale, bias, block_logits
    )
    return value


class _Blocks(torch.autograd.Function):
    """Loss and gradients in one pass over blocks of rows: no block outlives its turn, nothing is computed twice."""

    @staticmethod
    def forward(ctx: Any, block: Block, queries: Any, targets: Any, scale: Any, bias: Any, block_logits: int) -> Any:
        num_rows = max(1, block_logits // len(targets))
        needs = any(ctx.needs_input_grad[1:5])
        queries_grad, targets_grad = torch.empty_like(queries), torch.zeros_like(targets)
        totals = torch.zeros(3, device=queries.device)
        for start in range(0, len(queries), num_rows):
            rows = slice(start, min(start + num_rows, len(queries)))
            with torch.no_grad():
                value, slope_bM, by_scale, by_bias = block(rows, queries[rows] @ targets.T, scale, bias)
            totals += torch.stack([value, by_scale, by_bias])
            if needs:
                queries_grad[rows] = slope_bM @ targets * scale
                targets_grad.addmm_(slope_bM.T, queries[rows] * scale)
        totals = totals / len(queries)
        ctx.save_for_backward(queries_grad / len(queries), targets_grad / len(queries), totals)
        return totals[0].clone()

    @staticmethod
    def backward(ctx: Any, slope: Any) -> Any:
        queries_grad, targets_grad, totals = ctx.saved_tensors
        return None, queries_grad * slope, targets_grad * slope, totals[1] * slope, totals[2] * slope, None
