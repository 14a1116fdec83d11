"""Run the parts of an embedding job on a Ray cluster, with the same output files as the local engine.

The missing parts are the rows of a Ray dataset, which a pool of actors maps; each actor loads the model once. The file
of a part is written atomically, so if a worker crashes, it is replaced and its part is repeated: no row is lost or
written twice. All workers must be able to reach the output folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlm2vec.distributed.cluster import MAX_RESTARTS, RayPool, joined_cluster
from vlm2vec.jobs.embed import EmbedSettings, Job, Part, embed_part


class PartEncoder:
    """A Ray actor that loads the model once and embeds parts."""

    def __init__(self, model: str, options: dict[str, Any], settings: EmbedSettings) -> None:
        from vlm2vec.models.embedder import Embedder

        self.embedder, self.settings = Embedder.from_pretrained(model, **options), settings

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the files of the parts and return the number of records in each."""
        parts: list[Part] = list(batch["item"])
        for part in parts:
            embed_part(self.embedder, part, self.settings)
        return {"done": [len(part.records) for part in parts]}


def run_on_ray(job: Job, pool: RayPool, progress: Callable[[int], None] = lambda done: None) -> None:
    """Embed the missing parts of a job.

    Raises:
        UserError: if Ray is not installed.
    """
    with joined_cluster(pool.address) as num_gpus:
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False  # our progress bar counts inputs
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
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )
        for row in done.iter_rows():
            progress(int(row["done"]))
