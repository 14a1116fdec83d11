"""A weighted sum of losses over all queries, computed block by block with its gradient.

Memory grows with B + M and not with B x M.

Shapes: B queries, M targets, D embedding dim; b queries of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vlm2vec.losses.functions import LOSSES
from vlm2vec.losses.labels import Exclusions, Labels, LossBlock

BLOCK_LOGITS = 2**22
"""Upper limit of logits in one block: 16 MiB in float32."""


def contrastive_loss(
    queries_BD: torch.Tensor,
    targets_MD: torch.Tensor,
    labels: Labels,
    losses: Mapping[str, float],
    temperature: float | torch.Tensor = 0.02,
    bias: float | torch.Tensor = 0.0,
    block_logits: int = BLOCK_LOGITS,
) -> torch.Tensor:
    """Weighted sum of losses, mean over queries.

    Args:
        queries_BD: Unit-norm query vectors, shape [B, D].
        targets_MD: Unit-norm target vectors, shape [M, D]; positives and negatives in any order.
        labels: The positives of each query, exclusions and scores.
        losses: Names from `LOSSES` with their weights.
        temperature: Divisor of the cosine, above 0; a smaller value gives a sharper softmax. Default 0.02, as in
            VLM2Vec. Pass a tensor to learn it.
        bias: Added to every logit of `sigmoid`. Pass a tensor to learn it.
        block_logits: Approximate number of logits in memory at a time; does not change the result.

    Returns:
        A scalar in float32.

    Raises:
        ValueError: if the temperature is not above 0.
    """
    if not isinstance(temperature, torch.Tensor) and temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    terms = [(LOSSES[name], weight) for name, weight in losses.items()]

    def block_loss(rows: slice, cosines_bM: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        block = LossBlock(cosines_bM, scale, shift, labels, rows)
        return torch.stack([weight * loss(block).sum() for loss, weight in terms]).sum()

    scale, shift = 1 / _scalar(temperature, queries_BD), _scalar(bias, queries_BD)
    value: torch.Tensor = _Blocks.apply(  # type: ignore[no-untyped-call]
        block_loss, block_logits, queries_BD.float(), targets_MD.float(), scale, shift
    )
    return value


def info_nce(
    queries_BD: torch.Tensor,
    targets_MD: torch.Tensor,
    target_index_B: torch.Tensor,
    temperature: float | torch.Tensor = 0.02,
    exclusions: Exclusions | None = None,
    block_logits: int = BLOCK_LOGITS,
) -> torch.Tensor:
    """Computes `info_nce` for queries with a single positive each, at row `target_index_B` of the targets."""
    labels = Labels.one_positive(target_index_B, len(targets_MD), exclusions)
    return contrastive_loss(queries_BD, targets_MD, labels, {"info_nce": 1.0}, temperature, 0.0, block_logits)


def matryoshka(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    queries_BD: torch.Tensor,
    targets_MD: torch.Tensor,
    dims: Sequence[int],
) -> torch.Tensor:
    """Mean of a loss over embeddings truncated to their first dimensions and normalized again.

    Source: Matryoshka representation learning (arXiv 2205.13147), equal weights.

    Args:
        loss: Function of unit-norm queries and targets.
        queries_BD: Query embeddings, shape [B, D].
        targets_MD: Target embeddings, shape [M, D].
        dims: Truncated lengths, each at most D.
    """
    values = [loss(F.normalize(queries_BD[:, :dim], dim=-1), F.normalize(targets_MD[:, :dim], dim=-1)) for dim in dims]
    return torch.stack(values).mean()


def _scalar(value: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.float() if isinstance(value, torch.Tensor) else torch.tensor(value, device=like.device)


class _Blocks(torch.autograd.Function):
    """Computes loss and gradient in one pass over blocks of queries.

    Autograd differentiates each block and then frees its graph; the matrix products with the embeddings are outside the
    graph.
    """

    @staticmethod
    def forward(ctx: Any, block_loss: Any, block_logits: int, queries: Any, targets: Any, *scalars: Any) -> Any:
        num_rows = max(1, block_logits // len(targets))
        needs_gradient = any(ctx.needs_input_grad[2:])
        scalars = tuple(scalar.detach().requires_grad_(needs_gradient) for scalar in scalars)
        value = torch.zeros((), device=queries.device)
        gradients = [torch.zeros_like(tensor) for tensor in (queries, targets, *scalars)] if needs_gradient else []
        with torch.autocast(queries.device.type, enabled=False):  # cosines and their gradients stay in float32
            for start in range(0, len(queries), num_rows):
                rows = slice(start, min(start + num_rows, len(queries)))
                cosines_bM = (queries[rows] @ targets.T).requires_grad_(needs_gradient)
                with torch.set_grad_enabled(needs_gradient):
                    loss = block_loss(rows, cosines_bM, *scalars)
                value += loss.detach()
                if needs_gradient:
                    by_cosine_bM, *by_scalars = torch.autograd.grad(
                        loss, (cosines_bM, *scalars), allow_unused=True, materialize_grads=True
                    )
                    torch.mm(by_cosine_bM, targets, out=gradients[0][rows])
                    gradients[1].addmm_(by_cosine_bM.T, queries[rows])
                    for total, part in zip(gradients[2:], by_scalars, strict=True):
                        total += part
        ctx.save_for_backward(*[gradient.div_(len(queries)) for gradient in gradients])
        return value / len(queries)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return None, None, *[saved * gradient for saved in ctx.saved_tensors]
