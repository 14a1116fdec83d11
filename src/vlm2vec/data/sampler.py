"""Which examples make the batch of a step: a pure function of the seed, the same for any number of workers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal

from torch.utils.data import Sampler

from vlm2vec.errors import UserError

Batching = Literal["mixed", "single"]


class BatchSampler(Sampler[list[int]]):
    """Batches of indices into the concatenation of several sets.

    Every set is walked in its own shuffled order, anew each epoch of that set. A global batch is cut into equal
    parts, one a process, so that two processes see together what one process would see.

    Args:
        sizes: Examples of each set.
        weights: Share of each set, any positive scale.
        batch_size: Pairs a step over all processes.
        num_steps: Batches to yield.
        seed: Of every random choice.
        batching: "mixed": every pair's set is drawn by weight; "single": one set a step, drawn by weight.
        rank: This process.
        num_processes: All processes; divides `batch_size`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        batch_size: int,
        num_steps: int,
        seed: int,
        batching: Batching = "mixed",
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        if batch_size % num_processes:
            raise UserError(f"batch_size {batch_size}: expected a multiple of the {num_processes} processes")
        self.sizes, self.weights = list(sizes), list(weights)
        self.batch_size, self.num_steps, self.seed, self.batching = batch_size, num_steps, seed, batching
        part = batch_size // num_processes
        self.part = slice(rank * part, (rank + 1) * part)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(f"{self.seed} sets")
        offsets = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        streams = [self._stream(i) for i in range(len(self.sizes))]
        choices = range(len(self.sizes))
        for _ in range(self.num_steps):
            if self.batching == "single":
                drawn = rng.choices(choices, self.weights) * self.batch_size
            else:
                drawn = rng.choices(choices, self.weights, k=self.batch_size)
            yield [offsets[i] + next(streams[i]) for i in drawn][self.part]

    def _stream(self, which: int) -> Iterator[int]:
        epoch = 0
        while True:
            order = list(range(self.sizes[which]))
            random.Random(f"{self.seed} set {which} epoch {epoch}").shuffle(order)
            yield from order
            epoch += 1
