"""Chooses how many batches are prepared in advance, by their size and the machine's shared memory."""

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
"""Number of pairs that are prepared to estimate the size of a batch."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
"""Data loader processes pass batches through files in this folder; containers have 64 MiB by default."""
SHARE = 0.8
"""Maximum fraction of the free shared memory."""
MOST_PER_PROCESS = 2


def batch_bytes(batch: PairBatch) -> int:
    """Returns the size of all tensors of a batch in bytes."""
    own = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in (*own, *batch.inputs.tensors.values(), *batch.inputs.rows.values()))


def processes(wanted: int, size: int, limit: int, free: int | None) -> tuple[int, int]:
    """Returns the number of processes that prepare batches, and the number of batches that each prepares in advance.

    One further batch is in use. At least one process prepares one batch, even above the limit.

    Args:
        wanted: Value of `data.num_workers`, at least 1.
        size: Size of a batch in bytes.
        limit: Maximum size of all prepared batches in bytes.
        free: Free shared memory in bytes; None if the system has no limit.

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
    """Returns the DataLoader arguments for `data.num_workers`; logs if fewer processes are used.

    Args:
        wanted: Value of `data.num_workers`, at least 1.
        limit_gib: Maximum size of all prepared batches of this machine in GiB.
        collate: Function from pairs to a batch.
        pairs: Some pairs of the run, used to estimate the size of a batch.
        batch_size: Pairs per batch of this rank.

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
