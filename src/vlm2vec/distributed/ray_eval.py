"""A benchmark's inputs encoded by the workers of a Ray cluster, into the one store: the local engine's results.

Parts are those of the local engine, so a vector has the same batch mates. Each actor loads the model once, for all
tasks, and puts a part's vectors into the store itself; one that dies is started again and its part done anew, without
what it had put. The store's folder and the data must be ones that all workers see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm2vec.distributed.cluster import TRIES, RayPool, joined_cluster
from vlm2vec.errors import UserError
from vlm2vec.evaluation.run import Engine, LocalEngine
from vlm2vec.retrieval.embedding_cache import EmbeddingStore, VectorStore, fill
from vlm2vec.types import EmbeddingInput

Items = dict[bytes, EmbeddingInput]


class EvalWorker:
    """An actor: the model, and the parts of the store that fall to it."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.model, self.options = model, options
        self.store: EmbeddingStore | None = None

    @cached_property
    def engine(self) -> LocalEngine:
        """The model, loaded by the first call: a mistake is then that call's answer, not a death to try again."""
        return LocalEngine(self.model, self.options)

    def describe(self) -> tuple[dict[str, str], dict[str, int]]:
        """What its vectors depend on, and the model's size."""
        return self.engine.about, self.engine.size

    def fill(self, root: str, part: Items) -> int:
        """Encodes what the store lacks of a part; returns how many inputs that were."""
        if self.store is None or str(self.store.folder.parent) != root:
            self.store = EmbeddingStore(Path(root), self.engine.about)
        self.store.refresh()  # what this part's earlier worker may have put before it died
        return fill(self.store, part, self.engine.encode, part_size=len(part))


class RayEngine:
    """A pool of actors as an evaluation's engine; see `vlm2vec.evaluation.run.Engine`.

    Args:
        workers: Handles of `EvalWorker` actors.

    Raises:
        UserError: if they would give different vectors (another device, other versions), or cannot load the model.
    """

    def __init__(self, workers: list[Any]) -> None:
        import ray

        self.workers = workers
        described = _answers(lambda: ray.get([worker.describe.remote() for worker in workers]))
        self.about, self.size = described[0]
        for about, _ in described:
            if names := [name for name in about if about[name] != self.about[name]]:
                raise UserError(f"Ray's workers differ in {', '.join(names)}: their vectors cannot share a store")
        self.num_encoded = 0

    def fill(
        self,
        store: VectorStore,
        items: Mapping[bytes, EmbeddingInput],
        *,
        part_size: int,
        share: tuple[int, int] = (0, 1),
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Encodes what a store lacks, as many parts at a time as there are workers; `share` is not looked at."""
        from ray.util import ActorPool

        assert isinstance(store, EmbeddingStore)  # one that the workers see, too
        root, keys = str(store.folder.parent.resolve()), list(items)
        missing: list[Items] = []
        for start in range(0, len(keys), part_size):
            part = keys[start : start + part_size]
            lacking = {key: items[key] for key in part if key not in store}
            progress(len(part) - len(lacking))
            missing += [lacking] if lacking else []

        def work(worker: Any, part: Items) -> Any:
            return worker.fill.remote(root, part)

        def run() -> None:
            for number, part in zip(ActorPool(self.workers).map(work, missing), missing, strict=True):
                self.num_encoded += number
                progress(len(part))

        _answers(run)


@contextmanager
def ray_engine(pool: RayPool) -> Iterator[Engine]:
    """The engine of these workers, as long as the block runs.

    Raises:
        UserError: if Ray is not installed.
    """
    with joined_cluster(pool.address) as num_gpus:
        import ray

        kind = ray.remote(num_cpus=1, num_gpus=pool.gpus_of_each(num_gpus), max_restarts=TRIES, max_task_retries=TRIES)(
            EvalWorker
        )
        workers = [kind.remote(pool.model, pool.options) for _ in range(pool.num_workers)]
        try:
            yield RayEngine(workers)
        finally:
            for worker in workers:
                ray.kill(worker)


def _answers(call: Callable[[], Any]) -> Any:
    """What a call of actors returns; a user's mistake there is one here, in its own line."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return call()
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise
    except RayActorError as error:
        raise UserError(
            f"a worker of Ray ended {TRIES + 1} times on the same part; what was encoded is kept"
        ) from error
