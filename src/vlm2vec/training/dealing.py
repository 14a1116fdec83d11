"""Balances the encoding work of the ranks: distributes inputs by tokens and returns their vectors in order.

Without balancing, a rank with more images or longer texts delays all ranks at every collective. Only the encoding is
redistributed: the loss of a pair is computed on the rank that read it, so loss and gradient do not change.

Shapes: U inputs that this rank read, D embedding dim.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Sequence

import torch
import torch.distributed as dist

from vlm2vec.batch import Batch
from vlm2vec.training.gather import gather_rows, gather_with_gradient, rank, world_size

TOLERANCE = 0.01
"""Balancing stops when the busiest rank has at most this fraction more tokens than the mean."""


def deal(lengths: Sequence[Sequence[int]]) -> list[list[int]]:
    """Assigns each input to a rank for encoding, moving few inputs.

    The busiest rank repeatedly gives the least busy rank the input that comes closest to halving their difference,
    until the busiest has at most `TOLERANCE` more tokens than the mean or no move helps.

    Args:
        lengths: Tokens of each input, by the rank that read it.

    Returns:
        The encoding rank of each input, in the shape of `lengths`. Every rank has at least one input.
    """
    owners = [[reader] * len(mine) for reader, mine in enumerate(lengths)]
    held = [sorted((length, reader, row) for row, length in enumerate(mine)) for reader, mine in enumerate(lengths)]
    sums = [sum(mine) for mine in lengths]
    mean = sum(sums) / len(sums)
    for _ in range(sum(map(len, lengths))):
        most, least = sums.index(max(sums)), sums.index(min(sums))
        gap = sums[most] - sums[least]
        if sums[most] <= (1 + TOLERANCE) * mean:
            break
        place = max(0, bisect.bisect_right(held[most], (gap // 2, len(sums), 0)) - 1)
        if held[most][place][0] >= gap:
            break
        length, reader, row = moved = held[most].pop(place)
        bisect.insort(held[least], moved)
        owners[reader][row] = least
        sums[most] -= length
        sums[least] += length
    return owners


class DealtRows:
    """The inputs that this rank encodes instead of those that it read.

    Every rank must construct this object and call `own`.

    Args:
        batch: The U inputs that this rank read.
        device: Device of the collectives.

    Attributes:
        batch: The inputs to encode.
    """

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.batch = batch
        self._index: torch.Tensor | None = None
        if world_size() == 1:
            return
        lengths = [part.tolist() for part in gather_rows(torch.tensor(batch.lengths(), device=device))]
        owners = deal(lengths)
        if all(owner == reader for reader, mine in enumerate(owners) for owner in mine):
            return
        to = [[row for row, owner in enumerate(owners[rank()]) if owner == other] for other in range(world_size())]
        parts = _exchange([batch.select(rows) if rows else None for rows in to], device)
        self.batch = Batch.join(parts)
        self._index = torch.tensor(_places(owners), device=device)

    def own(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns the vectors [U, D] of the inputs that this rank read, given those of `batch`; differentiable."""
        if self._index is None:
            return vectors
        return torch.cat(gather_with_gradient(vectors))[self._index]


def _places(owners: Sequence[Sequence[int]]) -> list[int]:
    """Returns the positions of this rank's inputs among all vectors, sorted by encoding rank, reading rank and row."""
    by_owner: list[list[tuple[int, int]]] = [[] for _ in owners]
    for reader, mine in enumerate(owners):
        for row, owner in enumerate(mine):
            by_owner[owner].append((reader, row))
    place = {key: number for number, key in enumerate(key for keys in by_owner for key in keys)}
    return [place[rank(), row] for row in range(len(owners[rank()]))]


def _exchange(parts: Sequence[Batch | None], device: torch.device) -> list[Batch]:
    """Sends `parts[r]` to rank r (None: nothing); returns what this rank receives, by sender."""
    sent = [torch.empty(0, dtype=torch.uint8) if part is None else _to_bytes(part) for part in parts]
    sent[rank()] = sent[rank()][:0]  # this rank's own part is not transferred
    sizes = torch.tensor([len(data) for data in sent], device=device)
    incoming = torch.empty_like(sizes)
    dist.all_to_all_single(incoming, sizes)
    counts = incoming.tolist()
    received = torch.empty(sum(counts), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, torch.cat(sent).to(device), counts, [len(data) for data in sent])
    batches = [_from_bytes(data) if len(data) else None for data in torch.split(received.cpu(), counts)]
    batches[rank()] = parts[rank()]
    return [batch for batch in batches if batch is not None]


def _to_bytes(batch: Batch) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save({**vars(batch)}, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _from_bytes(data: torch.Tensor) -> Batch:
    return Batch(**torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True))
