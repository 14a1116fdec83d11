"""Trains a reranker: the step and the Trainer of pairs of a query and a candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlm2vec.data.candidates import CandidateBatch, collate_candidates
from vlm2vec.data.examples import TrainExample
from vlm2vec.losses.ranking import RANKING_LOSSES
from vlm2vec.training.gather import sum_over_ranks
from vlm2vec.training.step import ContrastiveStep, StepResult
from vlm2vec.training.trainer import ContrastiveTrainer


class RankingObjective(nn.Module):
    """The mean over queries of a loss from `RANKING_LOSSES`; it has no parameters.

    Args:
        loss: Name of the loss.
    """

    learns = False

    def __init__(self, loss: str) -> None:
        super().__init__()
        self._loss = RANKING_LOSSES[loss]

    def forward(self, logits_P: torch.Tensor, candidates: CandidateBatch, num_queries: int) -> torch.Tensor:
        """Computes this rank's share of the loss; the shares of all ranks sum to the mean over the whole batch.

        Args:
            logits_P: Log-odds of this rank's pairs.
            candidates: This rank's pairs.
            num_queries: Number of queries over all ranks.
        """
        device = logits_P.device
        losses_B = self._loss(logits_P, candidates.is_positive.to(device), candidates.counts.to(device))
        return losses_B.sum() / num_queries


class RerankStep(ContrastiveStep):
    """Computes the gradient of a batch of candidates chunk by chunk."""

    def backward(self, pairs: Any, parameters: Any = ()) -> StepResult:
        """Accumulates the gradient in the parameters, then sums the gradients of `parameters` over the ranks."""
        candidates: CandidateBatch = pairs
        num_queries = int(sum_over_ranks(torch.tensor(len(candidates.counts), device=self.device)))

        def loss(logits_P1: torch.Tensor) -> torch.Tensor:
            share: torch.Tensor = self.objective(logits_P1[:, 0], candidates, num_queries)
            return share

        return StepResult(self.backward_of(candidates.inputs, loss, parameters))


class RerankTrainer(ContrastiveTrainer):
    """Trains a `PairModel`; data, schedules, checkpoints and resuming are those of embedding models."""

    step_class = RerankStep

    def _make_objective(self) -> Any:
        return RankingObjective(self.recipe.rerank.loss)

    def _collate(self, examples: Sequence[TrainExample]) -> dict[str, Any]:
        model: Any = self.embedder
        return {
            "pairs": collate_candidates(model.backbone.process, model.pair, examples, self.recipe.rerank.candidates)
        }

    def _extra_parameters(self) -> dict[str, nn.Parameter]:
        model: Any = self.embedder
        return {f"head.{name}": value for name, value in model.head.named_parameters()}
