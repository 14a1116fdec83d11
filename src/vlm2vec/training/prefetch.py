"""Batches that are prepared in advance: as many as their bytes and the machine's shared memory allow."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vlm2vec.data.collate import PairBatch
from vlm2vec.errors import UserError
from vlm2vec.training.gather import world_size

logger = logging.getLogger(__name__)
GIB = 2**30
SAMPLE = 32
"""Pairs that are prepared to estimate the bytes of a batch."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
"""Processes hand batches over in files of this folder; a container has 64 MiB of it by default."""
SHARE = 0.8
"""Of the free shared memory."""
MOST_PER_PROCESS = 2


def batch_bytes(batch: PairBatch) -> int:
    """Bytes of all tensors of a batch."""
    own = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in (*own, *batch.inputs.tensors.values(), *batch.inputs.rows.values()))


def processes(wanted: int, size: int, limit: int, free: int | None) -> tuple[int, int]:
    """How many processes prepare batches, and how many batches each prepares in advance.

    One more batch is in use. At least one process prepares one batch, even above the limit.

    Args:
        wanted: As `data.num_workers`, at least 1.
        size: Bytes of a batch.
        limit: Bytes of all prepared batches.
        free: Bytes of free shared memory; None where the system has no such limit.

    Raises:
        UserError: if not even two batches fit in the shared memory.
    """
    available = limit if free is None else min(limit, int(SHARE * free))
    if free is not None and 2 * size > SHARE * free:
        needed = math.ceil(3 * size / SHARE / GIB)
        raise UserError(
            f"data.num_workers {wanted}: a prepared batch has {size / GIB:.2f} GiB, but {SHARED_MEMORY} has only "
            f"{free / GIB:.2f} GiB free; start the container with --shm-size={needed}g, or set data.num_workers=0"
        )
    ahead = max(1, available // size - 1)
    count = min(wanted, ahead)
    return count, min(MOST_PER_PROCESS, ahead // count)


def prefetching(
    wanted: int, limit_gib: float, collate: Callable[[Sequence[Any]], PairBatch], pairs: Sequence[Any], batch_size: int
) -> dict[str, int]:
    """Arguments of a DataLoader for `data.num_workers`; fewer processes than wanted are named in the log.

    Args:
        wanted: As `data.num_workers`, at least 1.
        limit_gib: Of all prepared batches of this machine.
        collate: Pairs -> a batch.
        pairs: Some pairs of the run; they give the size of a batch.
        batch_size: Pairs of a batch of this rank.

    Raises:
        UserError: see `processes`.
    """
    size = max(1, batch_bytes(collate(pairs)) * batch_size // len(pairs))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())
    free = shutil.disk_usage(SHARED_MEMORY).free // ranks if SHARED_MEMORY.is_dir() else None
    count, ahead = processes(wanted, size, int(limit_gib * GIB) // ranks, free)
    if count < wanted:
        logger.warning(
            "data.num_workers %d: reduced to %d; a prepared batch has %.2f GiB (data.prefetch_gib, free shared memory)",
            wanted,
            count,
            size / GIB,
        )
    return {"num_workers": count, "prefetch_factor": ahead}
