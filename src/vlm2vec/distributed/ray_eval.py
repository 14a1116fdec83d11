"""Encode the inputs of a benchmark on a Ray cluster, with the same results as the local engine.

The parts are those of the local engine, so each vector is computed in the same batch. Each actor loads the model once
for all tasks and writes the vectors of a part to the embedding cache itself. An actor that dies is restarted and its
part is repeated, except for the vectors that are already in the cache. All workers must be able to reach the cache
folder and the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm2vec.distributed.cluster import RayPool, actors, answers
from vlm2vec.errors import UserError
from vlm2vec.evaluation.run import Engine, LocalEngine
from vlm2vec.retrieval.embedding_cache import EmbeddingCache, VectorCache, fill
from vlm2vec.types import EmbeddingInput

Items = dict[bytes, EmbeddingInput]


class EvalWorker:
    """A Ray actor that loads the model once and encodes parts into the embedding cache."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.model, self.options = model, options
        self.cache: EmbeddingCache | None = None

    @cached_property
    def engine(self) -> LocalEngine:
        """The model, loaded by the first call, so that a load error fails that call and causes no restart."""
        return LocalEngine(self.model, self.options)

    def describe(self) -> tuple[dict[str, str], dict[str, int]]:
        """The facts on which the vectors depend, and the size of the model."""
        return self.engine.about, self.engine.size

    def fill(self, root: str, part: Items) -> int:
        """Encode the inputs of a part that are missing in the cache; return their number."""
        cache = self.opened(root)
        cache.refresh()  # an earlier worker of this part may have written vectors before it died
        return fill(cache, part, self.engine.encode, part_size=len(part))

    def opened(self, root: str) -> EmbeddingCache:
        """The embedding cache of this model in a folder."""
        if self.cache is None or str(self.cache.folder.parent) != root:
            self.cache = EmbeddingCache(Path(root), self.engine.about)
        return self.cache


class RayEngine:
    """The engine of an evaluation on a pool of actors; see `vlm2vec.evaluation.run.Engine`.

    Args:
        workers: Handles of `EvalWorker` actors.

    Raises:
        UserError: if devices or versions of the workers differ, or a worker cannot load the model.
    """

    def __init__(self, workers: list[Any]) -> None:
        import ray

        self.workers = workers
        described = answers(lambda: ray.get([worker.describe.remote() for worker in workers]))
        self.about, self.size = described[0]
        for about, _ in described:
            if names := [name for name in about if about[name] != self.about[name]]:
                raise UserError(
                    f"Ray workers differ in {', '.join(names)}; their vectors cannot share an embedding cache"
                )
        self.num_encoded = 0

    def fill(
        self,
        cache: VectorCache,
        items: Mapping[bytes, EmbeddingInput],
        *,
        part_size: int,
        share: tuple[int, int] = (0, 1),
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Encode the inputs that are missing in the cache, one part per worker at a time; `share` is ignored."""
        from ray.util import ActorPool

        assert isinstance(cache, EmbeddingCache)  # the workers open it, too
        root, keys = str(cache.folder.parent.resolve()), list(items)
        missing: list[Items] = []
        for start in range(0, len(keys), part_size):
            part = keys[start : start + part_size]
            lacking = {key: items[key] for key in part if key not in cache}
            progress(len(part) - len(lacking))
            missing += [lacking] if lacking else []

        def work(worker: Any, part: Items) -> Any:
            return worker.fill.remote(root, part)

        def run() -> None:
            for number, part in zip(ActorPool(self.workers).map(work, missing), missing, strict=True):
                self.num_encoded += number
                progress(len(part))

        answers(run)


@contextmanager
def ray_engine(pool: RayPool) -> Iterator[Engine]:
    """Start the workers; they run for the duration of the block.

    Raises:
        UserError: if Ray is not installed.
    """
    with actors(pool, EvalWorker) as workers:
        yield RayEngine(workers)
