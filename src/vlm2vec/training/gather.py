"""Vectors of all processes in one tensor, and the sum of their gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


def num_processes() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_rows(local: torch.Tensor) -> list[torch.Tensor]:
    """The rows of every process, in rank order; their number may differ. This process's own keep their graph."""
    if num_processes() == 1:
        return [local]
    counts = [torch.zeros(1, dtype=torch.long, device=local.device) for _ in range(num_processes())]
    dist.all_gather(counts, torch.tensor([len(local)], device=local.device))
    longest = max(int(count) for count in counts)
    padded = local.new_zeros(longest, *local.shape[1:])
    padded[: len(local)] = local.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    rows = [part[: int(count)] for part, count in zip(gathered, counts, strict=True)]
    rows[dist.get_rank()] = local
    return rows


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds the gradients of all processes; one that a process did not touch counts as zero there."""
    if num_processes() == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
