"""Vectors of all processes in one tensor, and the sum of their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def num_processes() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_rows(local: torch.Tensor) -> list[torch.Tensor]:
    """The rows of every process, in rank order; their number may differ. This process's own keep their graph."""
    if num_processes() == 1:
        return [local]
    counts = _row_counts(local)
    longest = max(counts)
    padded = local.new_zeros(longest, *local.shape[1:])
    padded[: len(local)] = local.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    rows = [part[:count] for part, count in zip(gathered, counts, strict=True)]
    rows[dist.get_rank()] = local
    return rows


def gather_with_gradient(local: torch.Tensor) -> list[torch.Tensor]:
    """As `gather_rows`, and the gradient that any process has for a row goes back to the process that made it."""
    if num_processes() == 1:
        return [local]
    counts = _row_counts(local)
    padded = torch.cat([local, local.new_zeros(max(counts) - len(local), *local.shape[1:])])
    gathered: torch.Tensor = _Gather.apply(padded)  # type: ignore[no-untyped-call]
    return [part[:count] for part, count in zip(gathered, counts, strict=True)]


class _Gather(torch.autograd.Function):
    """[N, ...] of each process -> [P, N, ...]; backward sums every process's gradient of this process's rows."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(padded) for _ in range(num_processes())]
        dist.all_gather(parts, padded.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
        slope = slope.contiguous()
        dist.all_reduce(slope)
        return slope[dist.get_rank()]


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, without a gradient."""
    value = value.detach().clone()
    if num_processes() > 1:
        dist.all_reduce(value)
    return value


def most(number: int, device: torch.device) -> int:
    """The largest of the processes' numbers."""
    if num_processes() == 1:
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if num_processes() > 1:
        dist.barrier()


def _row_counts(local: torch.Tensor) -> list[int]:
    counts = [torch.zeros(1, dtype=torch.long, device=local.device) for _ in range(num_processes())]
    dist.all_gather(counts, torch.tensor([len(local)], device=local.device))
    return [int(count) for count in counts]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds the gradients of all processes; one that a process did not touch counts as zero there.

    Sharded gradients are the mean of the processes' already, and become their sum.
    """
    if num_processes() == 1:
        return
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            if parameter.grad is not None:
                parameter.grad.mul_(num_processes())
        elif parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
