"""Connect to a Ray cluster, and the settings of its workers; shared by all jobs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vlm2vec.errors import UserError

MAX_RESTARTS = 5  # of a worker, and retries of a part whose worker dies


@dataclass(frozen=True)
class RayPool:
    """Settings of the worker pool.

    Attributes:
        model: Source for `Embedder.from_pretrained`.
        num_workers: Number of actors; each loads its own copy of the model.
        address: Address of the cluster; None: start one on this machine.
        num_gpus: GPUs per actor; None: the GPUs of the cluster divided equally, at most one per actor.
        options: Other arguments of `from_pretrained`.
    """

    model: str
    num_workers: int = 2
    address: str | None = None
    num_gpus: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def gpus_of_each(self, in_cluster: float) -> float:
        """GPUs of one actor in a cluster with `in_cluster` GPUs.

        A fraction lets several actors share a GPU. Without `num_gpus` Ray hides all GPUs from an actor.
        """
        if self.num_gpus is not None:
            return self.num_gpus
        return min(1.0, in_cluster / self.num_workers)


@contextmanager
def joined_cluster(address: str | None) -> Iterator[float]:
    """Connect to a cluster, or start one on this machine for the duration of the block.

    A connection that exists already is used and stays open.

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


@contextmanager
def actors(pool: RayPool, kind: type) -> Iterator[list[Any]]:
    """Start the workers of a pool, which run for the duration of the block.

    Args:
        pool: Their settings.
        kind: Class of the actors; called with model and options.

    Yields:
        Their handles.

    Raises:
        UserError: if Ray is not installed.
    """
    with joined_cluster(pool.address) as num_gpus:
        import ray

        gpus = pool.gpus_of_each(num_gpus)
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS)(kind)
        workers = [remote.remote(pool.model, pool.options) for _ in range(pool.num_workers)]
        try:
            yield workers
        finally:
            for worker in workers:
                ray.kill(worker)


def answers(call: Callable[[], Any]) -> Any:
    """Return the result of a call to actors; a `UserError` there is raised as a `UserError` here."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return call()
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise
    except RayActorError as error:
        raise UserError(
            f"a Ray worker died {MAX_RESTARTS + 1} times on the same part; finished vectors are kept"
        ) from error
