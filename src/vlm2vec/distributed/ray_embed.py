"""An embedding job's parts on the workers of a Ray cluster: the files, and so the vectors, of the local engine.

The parts that are missing are the rows of a Ray Data set; a pool of actors, each of which loads the model once, maps
them. A part's file appears whole or not at all, so a worker that dies is replaced and its part done anew: nothing is
lost, nothing doubled. In each actor threads prepare inputs beside the model, as everywhere. The folder of the output
must be one that all workers see.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vlm2vec.errors import UserError
from vlm2vec.jobs.embed import EmbedSettings, Job, Part, embed_part

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


class PartEncoder:
    """An actor: the model, loaded once, and parts to embed."""

    def __init__(self, model: str, options: dict[str, Any], settings: EmbedSettings) -> None:
        from vlm2vec.models.embedder import Embedder

        self.embedder, self.settings = Embedder.from_pretrained(model, **options), settings

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Writes the files of these parts; returns how many records they have."""
        parts: list[Part] = list(batch["item"])
        for part in parts:
            embed_part(self.embedder, part, self.settings)
        return {"done": [len(part.records) for part in parts]}


def run_on_ray(job: Job, pool: RayPool, progress: Callable[[int], None] = lambda done: None) -> None:
    """Embeds every part of a job that is missing.

    Raises:
        UserError: if Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'vlm2vec[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(address=pool.address, log_to_driver=False, include_dashboard=False)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts inputs
    try:
        parts = list(job.missing(progress))
        if not parts:
            return
        done = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
            PartEncoder,
            fn_constructor_args=(pool.model, pool.options, job.settings),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(pool.num_workers, len(parts))),
            num_cpus=1,
            num_gpus=pool.num_gpus,
            max_restarts=TRIES,
            max_task_retries=TRIES,
        )
        for row in done.iter_rows():
            progress(int(row["done"]))
    finally:
        if started:
            ray.shutdown()
