"""Gradient caching: the exact gradient of a large batch's contrastive loss in the memory of a small chunk.

Source: GradCache (arXiv 2101.06983). 1. all chunks forward without graph, random state saved; 2. loss on all
vectors, gradient of each vector; 3. each chunk forward again under its random state, backward with its gradient.

Shapes: B queries, M targets, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from vlm2vec.types import Batch

Encode = Callable[[Batch], torch.Tensor]
Loss = Callable[[Sequence[torch.Tensor]], torch.Tensor]


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
    encode: Encode, sides: Sequence[Batch], loss: Loss, chunk_size: int, kept_chunks: int = 0
) -> torch.Tensor:
    """Accumulates the parameters' gradient of `loss` over all sides, `chunk_size` examples at a time.

    Args:
        encode: Batch -> vectors [b, D]; called once or twice a chunk.
        sides: Such as queries and targets; each is cut on its own.
        loss: Vectors of each side, whole, -> a scalar.
        chunk_size: Examples a forward pass.
        kept_chunks: So many chunks keep their graph from the first pass; the rest run forward twice.

    Returns:
        The loss, detached. The gradient is that of the plain, unchunked loss.
    """
    chunks = [(side, part) for side, batch in enumerate(sides) for part in batch.split(chunk_size)]
    states, first_pass = [], []
    for i, (_, part) in enumerate(chunks):
        states.append(RandomState(next(iter(part.tensors.values())).device))
        with torch.set_grad_enabled(i < kept_chunks):
            first_pass.append(encode(part))
    leaves = [vectors.detach().requires_grad_() for vectors in first_pass]
    owner = [side for side, _ in chunks]
    whole = [torch.cat([leaf for leaf, of in zip(leaves, owner, strict=True) if of == s]) for s in range(len(sides))]
    value = loss(whole)
    gradients = torch.autograd.grad(value, leaves)
    for i, (_, part) in enumerate(chunks):
        if i < kept_chunks:
            vectors = first_pass[i]
        else:
            with states[i]:
                vectors = encode(part)
        vectors.backward(gradients[i])  # type: ignore[no-untyped-call]
        first_pass[i] = vectors.detach()  # frees the graph
    return value.detach()
