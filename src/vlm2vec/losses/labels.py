"""What a loss knows about a block of queries and all targets: positives, exclusions, scores, logits.

Shapes: B queries, M targets, E dims of another model's vectors; b queries of one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

NO_QUERY = -1
"""The id of no query: marks a target that is nobody's positive."""
MASKED = -1e30
"""Logit of a target that is left out. Finite, so that a row without any target has a gradient of zero, not of NaN."""

Hardness = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]


@dataclass
class Reference:
    """Vectors that another model computed for the same queries and targets, unit norm, shapes [B, E] and [M, E]."""

    queries_BE: torch.Tensor
    targets_ME: torch.Tensor

    def cosines(self, rows: slice) -> torch.Tensor:
        """The other model's cosines of these queries and all targets, shape [b, M]."""
        return self.queries_BE[rows].float() @ self.targets_ME.float().T


@dataclass
class Exclusions:
    """Targets that are not negatives of a query, described without a B x M matrix. Positives are never excluded.

    Attributes:
        keys: Pairs of integers by query ([B], or [B, K] for K keys per query) and by target [M]. A target that shares a
            key with the query is excluded.
        margin: Excludes targets whose cosine exceeds the positive's by more than this, as likely unlabelled positives.
            None: off.
        guide: A second model that judges negatives (GISTEmbed, arXiv 2402.16829): targets that it finds closer to
            the query than the positive are excluded. None: off.
        guide_margin: The guide's cosine must exceed the positive's by more than this.
    """

    keys: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    margin: float | None = None
    guide: Reference | None = None
    guide_margin: float = 0.0

    def block(self, rows: slice, cosines_bM: torch.Tensor, is_positive_bM: torch.Tensor) -> torch.Tensor:
        """True where a target of these rows is excluded, shape [b, M]."""
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
    """True where the cosine exceeds that of the query's least similar positive by more than `margin`."""
    return cosines_bM > cosines_bM.masked_fill(~is_positive_bM, torch.inf).amin(dim=1, keepdim=True) + margin


@dataclass
class Labels:
    """What is known about the pairs of queries and targets.

    Attributes:
        query_ids_B: An integer per query.
        positive_of_M: Id of the query that each target is a positive of, or `NO_QUERY`. A query has at least one
            positive and may have several.
        given_with_M: Id of the query that each target came with, as a positive or as a hard negative. None: as
            `positive_of_M`.
        exclusions: Targets that must not count as negatives.
        hardness_alpha: Strength of hardness weighting, see `LossBlock.logits_bM`; 0: off.
        hardness_mode: Which negatives are weighted: those of other queries, those given with the query, or all.
        scores_M: Log-weight (score / temperature) of each target for the query it came with, such as a reranker's
            score; NaN where there is none. Read by `soft_labels`.
        teacher: Vectors of a model to imitate. Read by `distillation`.
        teacher_temperature: Divides the teacher's cosines.
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
        """Labels of queries that each have one positive, at row `target_index_B` of the targets."""
        columns_M = torch.arange(num_targets, device=target_index_B.device)
        return cls(target_index_B, columns_M, exclusions=exclusions or Exclusions())


@dataclass
class LossBlock:
    """What a loss function sees: b queries against all M targets.

    Attributes:
        cosines_bM: Their cosines; the gradient is taken with respect to these.
        scale: 1 / temperature, a scalar; may require a gradient.
        bias: A scalar; may require a gradient.
        labels: Of all queries.
        rows: Which queries are in this block.
    """

    cosines_bM: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    labels: Labels
    rows: slice

    @cached_property
    def is_positive_bM(self) -> torch.Tensor:
        """Whether a target is a positive of the query."""
        return self.labels.query_ids_B[self.rows, None] == self.labels.positive_of_M[None, :]

    @cached_property
    def is_own_bM(self) -> torch.Tensor:
        """Whether a target came with the query, as a positive or as a hard negative."""
        given_with_M = self.labels.positive_of_M if self.labels.given_with_M is None else self.labels.given_with_M
        return self.labels.query_ids_B[self.rows, None] == given_with_M[None, :]

    @cached_property
    def is_excluded_bM(self) -> torch.Tensor:
        """Whether a target must not count as a negative of the query."""
        return self.labels.exclusions.block(self.rows, self.cosines_bM.detach(), self.is_positive_bM)

    @cached_property
    def logits_bM(self) -> torch.Tensor:
        """Cosine / temperature; `MASKED` where a target is excluded.

        With hardness weighting each negative counts exp(alpha * cosine) times, its cosine taken as a constant, so
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
