"""An embedding job's parts on the workers of a Ray cluster: the files, and so the vectors, of the local engine.

The parts that are missing are the rows of a Ray Data set; a pool of actors, each of which loads the model once, maps
them. A part's file appears whole or not at all, so a worker that dies is replaced and its part done anew: nothing is
lost, nothing doubled. In each actor threads prepare inputs beside the model, as everywhere. The folder of the output
must be one that all workers see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlm2vec.distributed.cluster import TRIES, RayPool, joined_cluster
from vlm2vec.jobs.embed import EmbedSettings, Job, Part, embed_part


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
    with joined_cluster(pool.address) as num_gpus:
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts inputs
        parts = list(job.missing(progress))
        if not parts:
            return
        done = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
            PartEncoder,
            fn_constructor_args=(pool.model, pool.options, job.settings),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(pool.num_workers, len(parts))),
            num_cpus=1,
            num_gpus=pool.gpus_of_each(num_gpus),
            max_restarts=TRIES,
            max_task_retries=TRIES,
        )
        for row in done.iter_rows():
            progress(int(row["done"]))
