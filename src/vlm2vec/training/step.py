"""Computes a contrastive step without an optimizer: the gradients of the whole batch's loss for given pairs.

Shapes: U distinct inputs that this rank read, B queries, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from vlm2vec.batch import Batch, cut_by_tokens
from vlm2vec.data.collate import PairBatch
from vlm2vec.models.vision.frozen_vision import FrozenVision
from vlm2vec.training.attention import attention_for
from vlm2vec.training.config import TrainSettings
from vlm2vec.training.dealing import DealtRows
from vlm2vec.training.gather import sum_gradients, sum_over_ranks
from vlm2vec.training.gradcache import cached_backward
from vlm2vec.training.objective import GatheredTargets, Objective


@dataclass
class StepResult:
    """Statistics of a step.

    Attributes:
        loss: Loss of the whole batch over all ranks; a scalar.
        mean_cosine: Mean cosine of different inputs of this rank; 1 means that all vectors are equal.
        gathered: Metadata of the targets of all ranks; None if the model gives no vectors.
    """

    loss: torch.Tensor
    mean_cosine: float = 0.0
    gathered: GatheredTargets | None = None


class ContrastiveStep:
    """Computes the gradient of a batch's loss chunk by chunk.

    Args:
        model: Function from batch to unit-norm vectors [b, D]; called inside `context`.
        objective: The loss.
        settings: Chunk sizes, and the number of chunks that keep their graph.
        device: Device of the model.
        vision: Cache of the features of a frozen vision encoder; None: the encoder runs in both passes.
        context: Context manager around each forward pass, such as autocast.
        sharded: Whether the model's parameters are sharded over the ranks.
        in_half: Whether the model computes in bfloat16.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        objective: Objective,
        settings: TrainSettings,
        device: torch.device,
        vision: FrozenVision | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        sharded: bool = False,
        in_half: bool = False,
    ) -> None:
        self.model, self.objective, self.settings, self.device = model, objective, settings, device
        self.vision, self.context, self.sharded, self.in_half = vision, context, sharded, in_half

    def backward(self, pairs: PairBatch, parameters: Any = ()) -> StepResult:
        """Accumulates the gradient in the parameters, then sums the gradients of `parameters` over the ranks."""
        pairs = _keys_to(pairs, self.device)
        gathered = GatheredTargets.of(pairs, self.device)
        seen: dict[str, float] = {}

        def loss(vectors_UD: torch.Tensor) -> torch.Tensor:
            seen["mean_cosine"] = mean_cosine(vectors_UD.detach())
            return self.objective(vectors_UD[pairs.query_rows], vectors_UD[pairs.target_rows], pairs, gathered)  # type: ignore[no-any-return]

        value = self.backward_of(pairs.inputs, loss, parameters)
        return StepResult(value, seen["mean_cosine"], gathered)

    def backward_of(
        self, inputs: Batch, loss: Callable[[torch.Tensor], torch.Tensor], parameters: Any = ()
    ) -> torch.Tensor:
        """Accumulates the gradient of a function of this rank's outputs, chunk by chunk.

        Args:
            inputs: The U inputs that this rank read.
            loss: Function from the model's outputs [U, D], in the order of `inputs`, to this rank's share of the loss.
            parameters: Their gradients are summed over the ranks.

        Returns:
            The loss over all ranks.
        """
        dealt = DealtRows(inputs, self.device)

        def encode(batch: Any) -> torch.Tensor:
            with self.context():
                vectors: torch.Tensor = self.model(batch)
            return vectors

        tokens = self.settings.chunk_tokens
        assert tokens != "auto", "vlm2vec.training.chunks puts a number in its place"
        chunks = cut_by_tokens(dealt.batch.lengths(), self.settings.chunk_size, tokens)
        with attention_for(dealt.batch, self.device, self.in_half):
            value = cached_backward(
                encode,
                dealt.batch,
                lambda vectors: loss(dealt.own(vectors)),
                chunks,
                self.settings.kept_chunks,
                self.device,
                self.vision.serving if self.vision else (lambda i, part: nullcontext(part)),
                self.sharded,
            )
        if self.vision:
            self.vision.forget()
        sum_gradients(parameters)
        return sum_over_ranks(value)


def mean_cosine(vectors_UD: torch.Tensor) -> float:
    """Returns the mean cosine of different rows of unit-norm vectors; 0 for a single row."""
    num = len(vectors_UD)
    if num < 2:
        return 0.0
    sum_D = vectors_UD.float().sum(dim=0)
    return float((sum_D @ sum_D - num) / (num * (num - 1)))


def _keys_to(pairs: PairBatch, device: torch.device) -> PairBatch:
    moved = {name: value.to(device) for name, value in vars(pairs).items() if isinstance(value, torch.Tensor)}
    return PairBatch(**{**vars(pairs), **moved})
