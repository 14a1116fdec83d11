"""An evaluation on several ranks of `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from vlm2vec.evaluation.evaluate import Share
from vlm2vec.evaluation.score import TaskResult


@contextmanager
def joined_processes() -> Iterator[Share]:
    """The share of this rank while the block runs; without `torchrun` a single process has all inputs.

    Only barriers and the results of tasks use the network (gloo). Vectors are exchanged through the embedding cache, on
    a disk that all ranks see.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Share()
        return
    import torch.distributed as dist

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")

    def gather(results: list[TaskResult]) -> list[list[TaskResult]]:
        found: list[list[TaskResult]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, results)
        return found

    try:
        yield Share(dist.get_rank(), dist.get_world_size(), dist.barrier, gather)
    finally:
        if started:
            dist.destroy_process_group()
