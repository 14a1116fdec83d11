"""Contrastive losses: pure functions of tensors that know no model and no process group.

Shapes: B queries, M targets, D embedding dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def info_nce(
    queries_BD: torch.Tensor,
    targets_MD: torch.Tensor,
    target_index_B: torch.Tensor,
    temperature: float = 0.02,
    excluded_BM: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross entropy of each query's positive among all targets of the batch.

    loss = mean_b( -log( exp(q_b . t_pos(b) / temperature) / sum_m exp(q_b . t_m / temperature) ) )

    Source: VLM2Vec (arXiv 2410.05160), equation 1; temperature 0.02 as trained there.

    Args:
        queries_BD: Unit-norm query vectors, shape [B, D].
        targets_MD: Unit-norm target vectors, shape [M, D]; positives and negatives in any order.
        target_index_B: Row of each query's positive in `targets_MD`, shape [B].
        temperature: Divides the cosine; smaller is sharper. Above 0.
        excluded_BM: True where a target must not count as a negative of that query (it is equal to the positive),
            shape [B, M]. The positive itself always counts.

    Returns:
        A scalar in float32.

    Raises:
        ValueError: if the temperature is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    logits_BM = queries_BD.float() @ targets_MD.float().T / temperature
    if excluded_BM is not None:
        positive_BM = F.one_hot(target_index_B, targets_MD.shape[0]).bool()
        logits_BM = logits_BM.masked_fill(excluded_BM & ~positive_BM, float("-inf"))
    return F.cross_entropy(logits_BM, target_index_B)


def equal_target_mask(keys_M: torch.Tensor, target_index_B: torch.Tensor) -> torch.Tensor:
    """Marks targets that are the same input as a query's positive: false negatives, to be left out.

    Args:
        keys_M: One integer a target; equal integers mean equal inputs, shape [M].
        target_index_B: Row of each query's positive, shape [B].

    Returns:
        Boolean [B, M]; the positive itself is marked too (`info_nce` keeps it).
    """
    return keys_M[target_index_B][:, None] == keys_M[None, :]
