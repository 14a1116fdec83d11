"""Samples the batch of each step as a pure function of the seed, independent of the number of workers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal

from torch.utils.data import Sampler

from vlm2vec.data.streams import WINDOW
from vlm2vec.errors import UserError

Batching = Literal["mixed", "single", "interleaved"]


class BatchSampler(Sampler[list[int]]):
    """Yields batches of indices into the concatenation of several sets.

    Every set is traversed in shuffled order, reshuffled at each epoch of that set. The global batch is divided equally
    among the ranks, so all ranks together see exactly the batch that a single process would see.

    Args:
        sizes: Number of examples in each set, or, for a set that is read in blocks, in each of its blocks. Blocks are
            shuffled, and pairs are shuffled within every `WINDOW` consecutive blocks.
        weights: Sampling weight of each set; any positive scale.
        batch_size: Pairs per step over all ranks.
        num_steps: Number of batches to yield.
        seed: Seed of every random choice.
        batching: "mixed": sample a set by weight for every pair; "single": one set per step; "interleaved": one set
            per sub-batch.
        sub_batch_size: Pairs per sub-batch over all ranks; must divide `batch_size` or be at least as large.
        rank: Rank of this process.
        num_processes: World size; must divide `batch_size`.
    """

    def __init__(
        self,
        sizes: Sequence[int | Sequence[int]],
        weights: Sequence[float],
        batch_size: int,
        num_steps: int,
        seed: int,
        batching: Batching = "mixed",
        sub_batch_size: int = 64,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        if batch_size % num_processes:
            raise UserError(f"batch_size {batch_size}: expected a multiple of the {num_processes} processes")
        self.blocks = [[size] if isinstance(size, int) else list(size) for size in sizes]
        self.sizes, self.weights = [sum(blocks) for blocks in self.blocks], list(weights)
        self.batch_size, self.num_steps, self.seed = batch_size, num_steps, seed
        self.run_length = {"mixed": 1, "single": batch_size, "interleaved": min(sub_batch_size, batch_size)}[batching]
        if batch_size % self.run_length:
            raise UserError(f"sub_batch_size {sub_batch_size}: expected a divisor of batch_size {batch_size}")
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
            drawn = rng.choices(choices, self.weights, k=self.batch_size // self.run_length)
            drawn = [which for which in drawn for _ in range(self.run_length)]
            yield [offsets[i] + next(streams[i]) for i in drawn][self.part]

    def _stream(self, which: int) -> Iterator[int]:
        epoch = 0
        while True:
            rng = random.Random(f"{self.seed} set {which} epoch {epoch}")
            blocks = self.blocks[which]
            begins = [0, *accumulate(blocks)]
            numbers = list(range(len(blocks)))
            if len(numbers) > 1:
                rng.shuffle(numbers)
            for first in range(0, len(numbers), WINDOW):
                few = numbers[first : first + WINDOW]
                order = [i for number in few for i in range(begins[number], begins[number + 1])]
                rng.shuffle(order)
                yield from order
            epoch += 1
