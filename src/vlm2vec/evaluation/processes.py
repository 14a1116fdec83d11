"""Several processes of `torchrun` on one evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from vlm2vec.evaluation.evaluate import Share


@contextmanager
def joined_processes() -> Iterator[Share]:
    """The share of this process while the block runs; a single process without `torchrun` has all of it.

    Only waiting goes over the network (gloo): vectors meet in the embedding cache, on a disk that all processes see.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Share()
        return
    import torch.distributed as dist

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    try:
        yield Share(dist.get_rank(), dist.get_world_size(), dist.barrier)
    finally:
        if started:
            dist.destroy_process_group()
