"""The losses: each is a function of a `LossBlock` that returns one value per query, and one line in `LOSSES`.

Shapes: M targets; b queries of one block, P pairs of a query and a positive.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from vlm2vec.losses.labels import MASKED, LossBlock

LossFunction = Callable[[LossBlock], torch.Tensor]
"""A block -> one value per query, shape [b]."""


def info_nce_rows(block: LossBlock) -> torch.Tensor:
    """-log( exp(l_p) / (exp(l_p) + sum over negatives exp(l_n)) ), mean over the query's positives p.

    A positive is never a negative of another one. Source: VLM2Vec (arXiv 2410.05160), equation 1.
    """
    negatives_b = block.logits_bM.masked_fill(block.is_positive_bM, MASKED).logsumexp(dim=1)
    rows_P, columns_P = block.is_positive_bM.nonzero(as_tuple=True)
    loss_P = F.softplus(negatives_b[rows_P] - block.logits_bM[rows_P, columns_P])
    return torch.zeros_like(negatives_b).index_add(0, rows_P, loss_P) / block.is_positive_bM.sum(dim=1)


def supcon_rows(block: LossBlock) -> torch.Tensor:
    """Mean over the query's positives of -log softmax, with every positive in the denominator.

    Source: supervised contrastive learning (arXiv 2004.11362), equation 2 (L_out).
    """
    mean_b = (block.logits_bM * block.is_positive_bM).sum(dim=1) / block.is_positive_bM.sum(dim=1)
    return block.logits_bM.logsumexp(dim=1) - mean_b


def mil_nce_rows(block: LossBlock) -> torch.Tensor:
    """-log of the summed softmax probability of the positives: a single close positive is sufficient.

    Source: MIL-NCE (arXiv 1912.06430), equation 1.
    """
    positives_b = block.logits_bM.masked_fill(~block.is_positive_bM, MASKED).logsumexp(dim=1)
    return block.logits_bM.logsumexp(dim=1) - positives_b


def sigmoid_rows(block: LossBlock) -> torch.Tensor:
    """Sum over targets of -log sigmoid( z (l + bias) ), z = 1 for a positive, else -1: binary classification of pairs.

    Source: SigLIP (arXiv 2303.15343), equation 2.
    """
    sign_bM = block.is_positive_bM.float() * 2 - 1
    loss_bM = -F.logsigmoid(sign_bM * (block.cosines_bM * block.scale + block.bias))
    return loss_bM.masked_fill(block.is_excluded_bM, 0).sum(dim=1)


def soft_labels_rows(block: LossBlock) -> torch.Tensor:
    """KL(softmax of the scores || softmax of the logits) over the targets given with the query that have a score.

    A query with fewer than two scores counts as 0. Source: listwise distillation of a reranker, RocketQAv2 (arXiv
    2110.07367).
    """
    if block.labels.scores_M is None:
        return block.cosines_bM.sum(dim=1) * 0
    has_score_bM = block.is_own_bM & ~block.labels.scores_M.isnan()
    scores_bM = block.labels.scores_M.nan_to_num().expand_as(block.cosines_bM).masked_fill(~has_score_bM, MASKED)
    return _kl_rows(scores_bM, (block.cosines_bM * block.scale).masked_fill(~has_score_bM, MASKED))


def distillation_rows(block: LossBlock) -> torch.Tensor:
    """KL(softmax of the teacher's cosines / its temperature || softmax of the logits) over all targets of the batch."""
    teacher = block.labels.teacher
    if teacher is None:
        raise ValueError("distillation needs a teacher's vectors in labels.teacher")
    teacher_bM = teacher.cosines(block.rows) / block.labels.teacher_temperature
    return _kl_rows(teacher_bM, block.cosines_bM * block.scale)


def _kl_rows(wanted_bM: torch.Tensor, logits_bM: torch.Tensor) -> torch.Tensor:
    wanted_bM, found_bM = F.log_softmax(wanted_bM, dim=1), F.log_softmax(logits_bM, dim=1)
    return F.kl_div(found_bM, wanted_bM, reduction="none", log_target=True).sum(dim=1)


LOSSES: dict[str, LossFunction] = {
    "info_nce": info_nce_rows,
    "supcon": supcon_rows,
    "mil_nce": mil_nce_rows,
    "sigmoid": sigmoid_rows,
    "soft_labels": soft_labels_rows,
    "distillation": distillation_rows,
}
"""Loss functions by their name in recipes."""
