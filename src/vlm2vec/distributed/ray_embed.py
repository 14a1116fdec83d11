"""Run the parts of an embedding job on a Ray cluster, with the same output files as the local engine.

The driver lists the source once and gives each worker one part at a time, so it holds as many parts as there are
workers, however long the source is. Each actor loads the model once. The file of a part is written atomically, so if
a worker crashes, it is replaced and its part is repeated: no row is lost or written twice. All workers must be able
to reach the output folder and the source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlm2vec.distributed.cluster import MAX_RESTARTS, RayPool, answers, joined_cluster
from vlm2vec.jobs.embed import EmbedSettings, Job, Part, embed_part


class PartEncoder:
    """A Ray actor that loads the model once and embeds parts."""

    def __init__(self, model: str, options: dict[str, Any], settings: EmbedSettings) -> None:
        from vlm2vec.models.embedder import Embedder

        self.embedder, self.settings = Embedder.from_pretrained(model, **options), settings

    def embed(self, part: Part) -> int:
        """Write the file of a part and return the number of its records."""
        embed_part(self.embedder, part, self.settings)
        return len(part.records)


def run_on_ray(job: Job, pool: RayPool, progress: Callable[[int], None] = lambda done: None) -> None:
    """Embed the missing parts of a job.

    Raises:
        UserError: if Ray is not installed, or a worker died repeatedly on one part.
    """
    with joined_cluster(pool.address) as num_gpus:
        import ray
        from ray.util import ActorPool

        gpus = pool.gpus_of_each(num_gpus)
        kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS)(
            PartEncoder
        )
        workers: list[Any] = []
        actors = ActorPool([])
        try:
            for part in job.missing(progress):
                if len(workers) < pool.num_workers:
                    workers.append(kind.remote(pool.model, pool.options, job.settings))
                    actors.push(workers[-1])
                elif not actors.has_free():
                    progress(answers(actors.get_next_unordered))
                actors.submit(lambda worker, part: worker.embed.remote(part), part)
            while actors.has_next():
                progress(answers(actors.get_next_unordered))
        finally:
            for worker in workers:
                ray.kill(worker)
