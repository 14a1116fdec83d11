"""Gradient caching: the exact gradient of a large batch's contrastive loss in the memory of a small chunk.

Source: GradCache (arXiv 2101.06983). 1. Run all chunks forward without a graph and save the random state of each.
2. Compute the loss of all vectors and its gradient with respect to each vector. 3. Run each chunk forward again with
its saved random state, then backward with its gradient. In this implementation chunks contain rows of similar length up
to a number of tokens, some chunks keep their graph from the first pass, and a frozen vision encoder runs in the first
pass only (`models/vision/frozen_vision.py`).

Shapes: U distinct inputs, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import accumulate
from typing import Literal

import torch

from vlm2vec.batch import Batch
from vlm2vec.training.gather import max_over_ranks

Encode = Callable[[Batch], torch.Tensor]
Loss = Callable[[torch.Tensor], torch.Tensor]
Around = Callable[[int, Batch], AbstractContextManager[Batch]]
GPU_RESERVE = 0.2  # fraction of GPU memory that stays free when graphs are kept automatically


class RandomState:
    """Random state at construction; `with state:` replays it and restores the current state at exit."""

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
    around: Around = lambda i, part: nullcontext(part),
    sharded: bool = False,
) -> torch.Tensor:
    """Accumulates the gradient of `loss` in the parameters, one chunk at a time.

    Args:
        encode: Function from batch to vectors [b, D]; called once or twice per chunk.
        batch: U inputs; each chunk is moved to `device` just before its forward pass.
        loss: Function from vectors [U, D] in the batch's order to a scalar.
        chunks: Rows of each chunk; together they contain every row once.
        kept_chunks: Number of chunks that keep their graph from the first pass; the others run forward twice. "auto":
            on a GPU as many as fit in its memory, elsewhere only the last, whose graph does not raise the peak.
        device: Device of the model.
        around: Function from the chunk's number and content to a context manager for its forward pass, which yields the
            batch to encode.
        sharded: Whether layers are sharded over the ranks. All ranks then run as many forward passes as the rank with
            the most chunks; additional passes repeat the shortest chunk with a gradient of zero.

    Returns:
        The loss, detached. The gradient is that of the plain, unchunked loss.
    """
    device = torch.device(device)
    num_idle = max_over_ranks(len(chunks), device) - len(chunks) if sharded else 0
    # The batch is copied once, in the chunks' order; both passes then take views of it.
    ordered = batch.select([row for chunk in chunks for row in chunk])
    ends = list(accumulate(len(chunk) for chunk in chunks))
    bounds = list(zip([0, *ends], ends, strict=False))
    bounds = [bounds[-1]] * num_idle + bounds
    keep = _Keeping(kept_chunks, len(bounds), device, sharded)

    def forward(i: int) -> torch.Tensor:
        part = ordered.slice(*bounds[i])
        with around(i, part) as used:
            return encode(used.to(device))

    states: list[RandomState] = []
    first_pass: list[torch.Tensor] = []
    for i in range(len(bounds)):
        states.append(RandomState(device))
        with torch.set_grad_enabled(keep.next(i)):
            first_pass.append(forward(i))
    value, gradients = _loss_by_vector(loss, first_pass[num_idle:], chunks)
    gradients = [torch.zeros_like(vectors) for vectors in first_pass[:num_idle]] + gradients
    for i in sorted(range(len(bounds)), key=lambda i: i not in keep.kept):  # graphs that are held are freed first
        if i in keep.kept:
            vectors = first_pass[i]
        else:
            with states[i]:
                vectors = forward(i)
        vectors.backward(gradients[i])  # type: ignore[no-untyped-call]
        first_pass[i] = vectors.detach()  # frees the graph
        del vectors
    return value


def _loss_by_vector(
    loss: Loss, first_pass: Sequence[torch.Tensor], chunks: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the detached loss and its gradient with respect to each chunk's vectors.

    The gradients of the loss's own parameters are accumulated, too. Rows are reordered once for all chunks, since
    creating an index on the CPU in the loop over chunks would synchronize with the device.
    """
    rows_U = torch.tensor([row for chunk in chunks for row in chunk])
    vectors = torch.cat([part.detach() for part in first_pass])
    leaf_UD = vectors[torch.argsort(rows_U).to(vectors.device)].requires_grad_()
    value = loss(leaf_UD)
    value.backward()  # type: ignore[no-untyped-call]
    assert leaf_UD.grad is not None
    by_chunk = torch.split(leaf_UD.grad[rows_U.to(vectors.device)], [len(chunk) for chunk in chunks])
    return value.detach(), list(by_chunk)


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
        """Returns whether chunk `i` keeps its graph; called in order."""
        if self.automatic and self.device.type == "cuda":
            keep = self._fits()
            if self.sharded:  # the same chunks on every rank
                keep = max_over_ranks(not keep, self.device) == 0
        else:
            keep = i >= self.num_chunks - self.wanted
        if keep:
            self.kept.add(i)
        return keep

    def _fits(self) -> bool:
        """Returns whether another graph, as large as the largest so far, leaves the reserve free."""
        used = torch.cuda.memory_allocated(self.device)
        self._largest = max(self._largest, used - self._before)
        self._before = used
        _, total = torch.cuda.mem_get_info(self.device)
        return used + 2 * self._largest < (1 - GPU_RESERVE) * total
