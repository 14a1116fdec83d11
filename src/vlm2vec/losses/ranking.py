"""Losses of rerankers: pure functions of the logits of a query's candidates.

Shapes: P pairs of a query and a candidate, B queries, K candidates of a query.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

RankingLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def pointwise(logits_P: torch.Tensor, is_positive_P: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of each pair, as a mean over the candidates of each query.

    With equally many candidates for all queries, the mean over queries is `F.binary_cross_entropy_with_logits`.

    Args:
        logits_P: Log-odds of the pairs, the candidates of a query consecutive.
        is_positive_P: Whether the candidate is a positive of its query.
        counts_B: Number of candidates of each query.

    Returns:
        Loss of each query, [B].
    """
    losses_P = F.binary_cross_entropy_with_logits(logits_P, is_positive_P.to(logits_P.dtype), reduction="none")
    return torch.stack([part.mean() for part in torch.split(losses_P, counts_B.tolist())])


def listwise(logits_P: torch.Tensor, is_positive_P: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the positive in a softmax over the candidates of its query.

    With several positives, the mean over them; no positive is a negative of another.

    Args:
        logits_P: As for `pointwise`.
        is_positive_P: As for `pointwise`.
        counts_B: As for `pointwise`.

    Returns:
        Loss of each query, [B]; 0 for a query without negatives.
    """
    counts = counts_B.tolist()
    logits_BK = pad_sequence(list(torch.split(logits_P, counts)), batch_first=True)
    is_positive_BK = pad_sequence(list(torch.split(is_positive_P, counts)), batch_first=True)
    is_given_BK = torch.arange(logits_BK.shape[1], device=counts_B.device) < counts_B[:, None]
    lowest = torch.finfo(logits_P.dtype).min  # -inf for all would have NaN as its gradient
    negatives_BK = logits_BK.masked_fill(is_positive_BK | ~is_given_BK, lowest)
    losses_BK = torch.logaddexp(logits_BK, torch.logsumexp(negatives_BK, dim=1, keepdim=True)) - logits_BK
    return (losses_BK * is_positive_BK).sum(dim=1) / is_positive_BK.sum(dim=1)


RANKING_LOSSES: dict[str, RankingLoss] = {"pointwise": pointwise, "listwise": listwise}
"""Losses by their name in a recipe, `rerank.loss`."""
