"""Inputs of the loss functions: positives, exclusions, scores and logits of a block of queries and all targets.

Shapes: B queries, M targets, E embedding dim of another model; b queries of one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

NO_QUERY = -1
"""Query id that marks a target as a positive of no query."""
MASKED = -1e30
"""Logit of an excluded target. It is finite so that the gradient of a fully masked row is zero instead of NaN."""

Hardness = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]


@dataclass
class Reference:
    """Unit-norm embeddings of the same queries and targets by another model, shapes [B, E] and [M, E]."""

    queries_BE: torch.Tensor
    targets_ME: torch.Tensor

    def cosines(self, rows: slice) -> torch.Tensor:
        """Returns the other model's cosines of the given queries and all targets, shape [b, M]."""
        return self.queries_BE[rows].float() @ self.targets_ME.float().T


@dataclass
class Exclusions:
    """Targets that are not negatives of a query, described without a B x M matrix. Positives are never excluded.

    Attributes:
        keys: Pairs of integers by query ([B], or [B, K] for K keys per query) and by target [M]. A target that shares a
            key with the query is excluded.
        margin: Excludes targets whose cosine exceeds the positive's by more than this, as likely unlabelled positives.
            None: off.
        guide: Embeddings of a guide model (GISTEmbed, arXiv 2402.16829). Targets are excluded if the guide rates
            them closer to the query than the positive. None: off.
        guide_margin: Margin by which the guide's cosine must exceed the positive's.
    """

    keys: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    margin: float | None = None
    guide: Reference | None = None
    guide_margin: float = 0.0

    def block(self, rows: slice, cosines_bM: torch.Tensor, is_positive_bM: torch.Tensor) -> torch.Tensor:
        """Returns a mask of the excluded targets of these rows, shape [b, M]."""
        excluded_bM = torch.zeros_like(is_positive_bM)
        for of_query, of_target_M in self.keys:
            for key_B in of_query.unbind(1) if of_query.dim() == 2 else (of_query,):
                excluded_bM |= key_B[rows, None] == of_target_M[None, :]
        if self.margin is not None:
            excluded_bM |= _closer_than_positive(cosines_bM, is_positive_bM, self.margin)
        if self.guide is not None:
            excluded_bM |= _closer_than_positive(self.guide.cosines(rows), is_positive_bM, self.guide_margin)
        return excluded_bM & ~is_positive_bM


def _closer_than_positive(cosines_bM: torch.Tensor, is_positive_bM: torch.Tensor, margin: float) -> torch.Tensor:
    """Returns a mask of cosines that exceed that of the query's least similar positive by more than `margin`."""
    return cosines_bM > cosines_bM.masked_fill(~is_positive_bM, torch.inf).amin(dim=1, keepdim=True) + margin


@dataclass
class Labels:
    """Relations between the queries and the targets of a batch.

    Attributes:
        query_ids_B: An integer per query.
        positive_of_M: Id of the query that each target is a positive of, or `NO_QUERY`. A query has at least one
            positive and may have several.
        given_with_M: Id of the query that each target was given with, as a positive or a hard negative. None: same as
            `positive_of_M`.
        exclusions: Targets that are not used as negatives.
        hardness_alpha: Strength of hardness weighting, see `LossBlock.logits_bM`; 0: off.
        hardness_mode: The negatives to weight: in-batch negatives, the query's own hard negatives, or all.
        scores_M: Log-weight (score / temperature) of each target for the query that it was given with, such as a
            reranker score; NaN if there is no score. Used by `soft_labels`.
        teacher: Embeddings of the teacher model. Used by `distillation`.
        teacher_temperature: Divisor of the teacher's cosines.
    """

    query_ids_B: torch.Tensor
    positive_of_M: torch.Tensor
    given_with_M: torch.Tensor | None = None
    exclusions: Exclusions = field(default_factory=Exclusions)
    hardness_alpha: float = 0.0
    hardness_mode: Hardness = "all_negatives"
    scores_M: torch.Tensor | None = None
    teacher: Reference | None = None
    teacher_temperature: float = 1.0

    @classmethod
    def one_positive(
        cls, target_index_B: torch.Tensor, num_targets: int, exclusions: Exclusions | None = None
    ) -> Labels:
        """Creates labels for queries with a single positive each, at row `target_index_B` of the targets."""
        columns_M = torch.arange(num_targets, device=target_index_B.device)
        return cls(target_index_B, columns_M, exclusions=exclusions or Exclusions())


@dataclass
class LossBlock:
    """Input of a loss function: b queries against all M targets.

    Attributes:
        cosines_bM: Cosine similarities; the gradient is computed with respect to these.
        scale: 1 / temperature, a scalar; may require a gradient.
        bias: A scalar; may require a gradient.
        labels: Labels of all queries.
        rows: Slice of the queries in this block.
    """

    cosines_bM: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    labels: Labels
    rows: slice

    @cached_property
    def is_positive_bM(self) -> torch.Tensor:
        """Mask of the positives of each query."""
        return self.labels.query_ids_B[self.rows, None] == self.labels.positive_of_M[None, :]

    @cached_property
    def is_own_bM(self) -> torch.Tensor:
        """Mask of the targets given with each query, as positives or hard negatives."""
        given_with_M = self.labels.positive_of_M if self.labels.given_with_M is None else self.labels.given_with_M
        return self.labels.query_ids_B[self.rows, None] == given_with_M[None, :]

    @cached_property
    def is_excluded_bM(self) -> torch.Tensor:
        """Mask of the targets that are not used as negatives of each query."""
        return self.labels.exclusions.block(self.rows, self.cosines_bM.detach(), self.is_positive_bM)

    @cached_property
    def logits_bM(self) -> torch.Tensor:
        """Logits, cosine / temperature; `MASKED` for excluded targets.

        Hardness weighting multiplies the term of each negative by exp(alpha * cosine), with the cosine detached, so
        alpha * cosine is added to its logit. Source: LLaVE (arXiv 2503.04812), equation 5.
        """
        logits_bM = self.cosines_bM * self.scale
        if self.labels.hardness_alpha:
            hardness_bM = self.labels.hardness_alpha * self.cosines_bM.detach()
            logits_bM = logits_bM + hardness_bM.masked_fill(~self._is_weighted_bM, 0)
        return logits_bM.masked_fill(self.is_excluded_bM, MASKED)

    @property
    def _is_weighted_bM(self) -> torch.Tensor:
        if self.labels.hardness_mode == "in_batch_negatives":
            return ~self.is_own_bM
        if self.labels.hardness_mode == "hard_negatives":
            return self.is_own_bM & ~self.is_positive_bM
        return ~self.is_positive_bM
