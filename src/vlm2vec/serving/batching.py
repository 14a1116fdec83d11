"""Queued inputs, and which of them share a forward pass."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import numpy as np

from vlm2vec.batch import Batch
from vlm2vec.serving.refusals import Refusal
from vlm2vec.serving.truncation import REFUSE, Truncation
from vlm2vec.types import EmbeddingInput


@dataclass(frozen=True, slots=True)
class Embedded:
    """The result of one input.

    Attributes:
        vector: Unit norm, float32 [D].
        num_tokens: Tokens that the model reads, image tokens included.
        dropped: Text tokens that were cut, as the request asked.
    """

    vector: np.ndarray
    num_tokens: int
    dropped: int = 0


Outcome = Embedded | Refusal


@dataclass(eq=False)
class Job:
    """One input in the queue."""

    item: EmbeddingInput
    future: asyncio.Future[Outcome]
    truncation: Truncation = REFUSE
    arrived: float = field(default_factory=time.monotonic)
    batch: Batch | None = None
    num_tokens: int = 0
    dropped: int = 0

    @property
    def gone(self) -> bool:
        """Whether the request was cancelled, so that the result is no longer needed."""
        return self.future.cancelled()


@dataclass(frozen=True)
class Budget:
    """Limits of one forward pass.

    Attributes:
        tokens: Maximum number of tokens, padding included.
        inputs: Maximum number of inputs.
        padding: Maximum share of padding tokens: batching a text with an image ten times its length costs more than
            two passes.
    """

    tokens: int
    inputs: int
    padding: float

    def holds(self, num_inputs: int, longest: int, num_tokens: int) -> bool:
        """Whether `num_inputs` inputs with `num_tokens` tokens in total fit when padded to `longest` tokens each."""
        padded = num_inputs * longest
        return num_inputs <= self.inputs and padded <= self.tokens and padded - num_tokens <= self.padding * padded


def take_batch(ready: list[Job], budget: Budget) -> list[Job]:
    """Remove and return the next batch: the oldest input and the inputs closest to it in length.

    The oldest input is taken even if it exceeds the budget alone.

    Args:
        ready: Jobs in order of arrival; taken and cancelled jobs are removed.
        budget: Limits of the batch.
    """
    ready[:] = [job for job in ready if not job.gone]
    if not ready:
        return []
    oldest = ready[0]
    taken, longest, num_tokens = [oldest], oldest.num_tokens, oldest.num_tokens
    for job in sorted(ready[1:], key=lambda job: abs(job.num_tokens - oldest.num_tokens)):
        wider, more = max(longest, job.num_tokens), num_tokens + job.num_tokens
        if budget.holds(len(taken) + 1, wider, more):
            taken.append(job)
            longest, num_tokens = wider, more
    chosen = set(map(id, taken))
    ready[:] = [job for job in ready if id(job) not in chosen]
    return taken
