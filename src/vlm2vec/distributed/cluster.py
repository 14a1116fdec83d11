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
        num_gpus: Of each actor; None: the cluster's GPUs shared equally, at most one each.
        options: Other arguments of `from_pretrained`.
    """

    model: str
    num_workers: int = 2
    address: str | None = None
    num_gpus: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def gpus_of_each(self, in_cluster: float) -> float:
        """GPUs of one actor, where the joined cluster has `in_cluster` of them.

        A fraction lets several actors share a GPU; without `num_gpus` Ray would hide the GPUs from an actor.
        """
        if self.num_gpus is not None:
            return self.num_gpus
        return min(1.0, in_cluster / self.num_workers)


@contextmanager
def joined_cluster(address: str | None) -> Iterator[float]:
    """Joins the cluster, or starts one on this machine for the length of the block; one that was joined before stays.

    Yields:
        The number of GPUs in the cluster.

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
        yield float(ray.cluster_resources().get("GPU", 0))
    finally:
        if started:
            ray.shutdown()
