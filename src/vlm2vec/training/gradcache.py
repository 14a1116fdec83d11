"""Gradient caching: the exact gradient of a large batch's contrastive loss in the memory of a small chunk.

Source: GradCache (arXiv 2101.06983). 1. all chunks forward without graph, random state saved; 2. loss on all
vectors, gradient of each vector; 3. each chunk forward again under its random state, backward with its gradient.
Here chunks are cut by tokens from rows sorted by length, some keep their graph from the first pass, and a frozen
vision side runs in the first pass only (`models/vision/frozen_vision.py`).

Shapes: U distinct inputs, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Literal

import torch

from vlm2vec.training.gather import most
from vlm2vec.types import Batch

Encode = Callable[[Batch], torch.Tensor]
Loss = Callable[[torch.Tensor], torch.Tensor]
Around = Callable[[int, Batch], AbstractContextManager[object]]
GPU_RESERVE = 0.2  # of the card's memory stays free when graphs are kept automatically


class RandomState:
    """The random generators' state at construction; `with state:` replays it and restores the present one after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def __enter__(self) -> None:
        devices = [self.device] if self.cuda is not None else []
        self._fork = ExitStack()
        self._fork.enter_context(torch.random.fork_rng(devices=devices))
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def __exit__(self, *error: object) -> None:
        self._fork.close()


def cached_backward(
    encode: Encode,
    batch: Batch,
    loss: Loss,
    chunks: Sequence[Sequence[int]],
    kept_chunks: int | Literal["auto"] = 0,
    device: torch.device | str = "cpu",
    around: Around = lambda i, part: nullcontext(),
    sharded: bool = False,
) -> torch.Tensor:
    """Accumulates the parameters' gradient of `loss` over the batch, one chunk at a time.

    Args:
        encode: Batch -> vectors [b, D]; called once or twice a chunk.
        batch: U inputs; each chunk is moved to `device` when its turn comes.
        loss: Vectors [U, D] in the batch's order -> a scalar.
        chunks: Rows of each chunk; together every row once.
        kept_chunks: So many chunks keep their graph from the first pass; the rest run forward twice. "auto": on a GPU
            as many as its memory takes, elsewhere none but the last, whose graph costs no memory at the peak.
        device: Of the model.
        around: Entered around each forward pass with the chunk's number and content.
        sharded: Every process runs as many chunks as the one with the most, the shortest again for nothing: layers
            that are cut over the processes run on all of them or on none.

    Returns:
        The loss, detached. The gradient is that of the plain, unchunked loss.
    """
    device = torch.device(device)
    num_idle = most(len(chunks), device) - len(chunks) if sharded else 0
    chunks = [chunks[-1]] * num_idle + list(chunks)
    states: list[RandomState] = []
    first_pass: list[torch.Tensor] = []

    def forward(i: int) -> torch.Tensor:
        part = batch.select(chunks[i])
        with around(i, part):
            return encode(part.to(device))

    order = list(range(len(chunks)))
    keep = _Keeping(kept_chunks, len(chunks), device, sharded)
    for i in order:
        states.append(RandomState(device))
        with torch.set_grad_enabled(keep.next(i)):
            first_pass.append(forward(i))
    rows = torch.tensor([row for chunk in chunks[num_idle:] for row in chunk])
    leaf = torch.cat([vectors.detach() for vectors in first_pass[num_idle:]])
    leaf = leaf[torch.argsort(rows).to(leaf.device)].requires_grad_()
    value = loss(leaf)
    value.backward()  # type: ignore[no-untyped-call]  # of the vectors, and of what the loss itself learns
    gradient = leaf.grad
    assert gradient is not None
    for i in sorted(order, key=lambda i: i not in keep.kept):  # graphs that are held are freed first
        if i in keep.kept:
            vectors = first_pass[i]
        else:
            with states[i]:
                vectors = forward(i)
        own = gradient[torch.tensor(chunks[i], dtype=torch.long, device=gradient.device)] * (i >= num_idle)
        vectors.backward(own)  # type: ignore[no-untyped-call]
        first_pass[i] = vectors.detach()  # frees the graph
        del vectors
    return value.detach()


class _Keeping:
    """Decides during the first pass which chunks keep their graph."""

    def __init__(self, wanted: int | Literal["auto"], num_chunks: int, device: torch.device, sharded: bool) -> None:
        self.num_chunks, self.device, self.sharded = num_chunks, device, sharded
        self.automatic = wanted == "auto"
        self.wanted = 1 if wanted == "auto" else wanted
        self.kept: set[int] = set()
        self._largest = 0
        self._before = 0

    def next(self, i: int) -> bool:
        """Whether chunk `i` keeps its graph; called in order."""
        if self.automatic and self.device.type == "cuda":
            keep = self._fits()
            if self.sharded:  # the same chunks on every process
                keep = most(not keep, self.device) == 0
        else:
            keep = i >= self.num_chunks - self.wanted
        if keep:
            self.kept.add(i)
        return keep

    def _fits(self) -> bool:
        """Whether one more graph as large as the largest so far leaves the reserve free."""
        used = torch.cuda.memory_allocated(self.device)
        self._largest = max(self._largest, used - self._before)
        self._before = used
        _, total = torch.cuda.mem_get_info(self.device)
        return used + 2 * self._largest < (1 - GPU_RESERVE) * total
