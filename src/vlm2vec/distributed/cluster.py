"""Joining a Ray cluster, and what its workers are to be: shared by all work on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vlm2vec.errors import UserError

TRIES = 5  # of a part whose worker dies


@dataclass(frozen=True)
class RayPool:
    """The workers.

    Attributes:
        model: What `Embedder.from_pretrained` takes.
        num_workers: Actors, each with a model of its own.
        address: Of the cluster; None: one on this machine.
        num_gpus: Of each actor.
        options: Other arguments of `from_pretrained`.
    """

    model: str
    num_workers: int = 2
    address: str | None = None
    num_gpus: float = 0
    options: dict[str, Any] = field(default_factory=dict)


@contextmanager
def joined_cluster(address: str | None) -> Iterator[None]:
    """Joins the cluster, or starts one on this machine for the length of the block; one that was joined before stays.

    Raises:
        UserError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'vlm2vec[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        yield
    finally:
        if started:
            ray.shutdown()
