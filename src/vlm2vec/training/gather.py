"""Collectives over the ranks: gathering vectors, summing gradients, barrier."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""Time that a rank waits for the others; the default of `TrainingArguments.ddp_timeout`."""
BUCKET_BYTES = 64 << 20
"""Maximum size of the gradients that share an all-reduce."""


def world_size() -> int:
    """Returns the number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns the rank of this process; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def join_ranks(device: torch.device) -> None:
    """Joins the ranks that torchrun has started, as transformers' `TrainingArguments` does later; else does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState  # type: ignore[import-untyped]

        PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)


def gather_objects(value: T) -> list[T]:
    """Gathers a value of every rank in rank order; it can be any object that pickles."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def gather_rows(local: torch.Tensor) -> list[torch.Tensor]:
    """Gathers the rows of every rank in rank order; their number may differ. This rank's own rows keep their graph."""
    if world_size() == 1:
        return [local]
    counts = _row_counts(local)
    longest = max(counts)
    padded = local.new_zeros(longest, *local.shape[1:])
    padded[: len(local)] = local.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    rows = [part[:count] for part, count in zip(gathered, counts, strict=True)]
    rows[rank()] = local
    return rows


def gather_with_gradient(local: torch.Tensor) -> list[torch.Tensor]:
    """Like `gather_rows`, but differentiable: the gradients of a row from all ranks are summed on its own rank."""
    if world_size() == 1:
        return [local]
    counts = _row_counts(local)
    padded = torch.cat([local, local.new_zeros(max(counts) - len(local), *local.shape[1:])])
    gathered: torch.Tensor = _Gather.apply(padded)  # type: ignore[no-untyped-call]
    return [part[:count] for part, count in zip(gathered, counts, strict=True)]


class _Gather(torch.autograd.Function):
    """[N, ...] of each rank -> [world size, N, ...]; backward sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(padded) for _ in range(world_size())]
        dist.all_gather(parts, padded.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank()]


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """All-reduces a sum, without a gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def max_over_ranks(number: int, device: torch.device) -> int:
    """All-reduces the maximum of an integer."""
    if world_size() == 1:
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def barrier() -> None:
    """Waits until every rank has reached this call."""
    if world_size() > 1:
        dist.barrier()


def _row_counts(local: torch.Tensor) -> list[int]:
    counts = [torch.zeros(1, dtype=torch.long, device=local.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(local)], device=local.device))
    return [int(count) for count in counts]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums the parameters' gradients over the ranks; a missing gradient counts as zero.

    Gradients are all-reduced in buckets of `BUCKET_BYTES`, so hundreds of small adapters need only a few collectives.
    Sharded gradients are already the mean over the ranks; they are scaled to the sum.
    """
    if world_size() == 1:
        return
    gradients = []
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            if parameter.grad is not None:
                parameter.grad.mul_(world_size())
        elif parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        if len(bucket) == 1:
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Groups consecutive gradients by dtype, up to `BUCKET_BYTES` each; a larger gradient has its own group."""
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.nbytes > BUCKET_BYTES or gradient.dtype is not bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
