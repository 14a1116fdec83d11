"""Mine hard negatives on a Ray cluster, with the negatives of the local engine.

The actors encode the inputs into the embedding cache, as in an evaluation, and then share the comparison of queries
with targets: each takes one block of queries at a time and reads all targets from the cache, block by block.
The driver reads the sets once. An actor that dies is restarted and its block is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from vlm2vec.distributed.cluster import RayPool, actors, answers
from vlm2vec.distributed.ray_eval import EvalWorker, RayEngine
from vlm2vec.evaluation.evaluate import PART
from vlm2vec.retrieval.cache_folder import KEY_BYTES, default_cache
from vlm2vec.retrieval.embedding_cache import EmbeddingCache, InputKeys
from vlm2vec.retrieval.rank import Rows
from vlm2vec.training.mining import Finder
from vlm2vec.training.nearest import MiningRule, Positives, QueryBlock, mine_block, query_blocks
from vlm2vec.types import EmbeddingInput

Mined = tuple[int, list[list[int]]]


class MineWorker(EvalWorker):
    """A Ray actor that encodes parts, and finds the negatives of blocks of queries."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        super().__init__(model, options)
        self._targets: tuple[np.ndarray, Rows] | None = None

    def mine(
        self, targets_MK: np.ndarray, root: str, queries: list[bytes], block: QueryBlock, rule: MiningRule
    ) -> Mined:
        """Return the number of the first query of a block, and the negatives of its queries.

        Args:
            targets_MK: Keys of all targets, K bytes each, uint8.
            root: Folder of the embedding cache, which has all vectors.
            queries: Keys of the block's queries.
            block: Their positives.
            rule: Which targets become negatives.
        """
        cache = self.opened(root)
        if self._targets is None or not np.array_equal(self._targets[0], targets_MK):
            cache.refresh()
            self._targets = targets_MK, cache.rows([key.tobytes() for key in targets_MK])
        return block.first, mine_block(cache.rows(queries)[:], self._targets[1], block, rule)


class RayFinder(Finder):
    """The model of `vlm2vec mine` on a pool of actors.

    Args:
        model: Its name.
        engine: The actors, `MineWorker`.
    """

    def __init__(self, model: str, engine: RayEngine) -> None:
        self.name, self._engine, self._key_of = model, engine, InputKeys()
        self.cache = EmbeddingCache(default_cache(), engine.about)

    def _encode(self, items: dict[bytes, EmbeddingInput], progress: Callable[[int], None]) -> None:
        self._engine.fill(self.cache, items, part_size=PART, share=(0, 1), progress=progress)

    def negatives(
        self,
        queries: Sequence[bytes],
        targets: Sequence[bytes],
        own_N: np.ndarray,
        positives: Positives,
        rule: MiningRule,
        progress: Callable[[int], None],
    ) -> list[list[int]]:
        """See `mine_negatives`; an actor has one block at a time, so the driver holds as many as there are actors."""
        import ray
        from ray.util import ActorPool

        root, pool, found = str(self.cache.folder.parent.resolve()), ActorPool(self._engine.workers), {}
        keys_MK = ray.put(np.frombuffer(b"".join(targets), np.uint8).reshape(-1, KEY_BYTES))

        def take() -> None:
            first, mined = answers(pool.get_next_unordered)
            found[first] = mined
            progress(len(mined))

        for block in query_blocks(own_N, positives):
            if not pool.has_free():
                take()
            mine = list(queries[block.numbers()])
            pool.submit(lambda worker, given: worker.mine.remote(keys_MK, root, *given, rule), (mine, block))
        while pool.has_next():
            take()
        return [negatives for first in sorted(found) for negatives in found[first]]


@contextmanager
def ray_finder(pool: RayPool) -> Iterator[Callable[[str], Finder]]:
    """Start the workers; they run for the duration of the block.

    Yields:
        What `vlm2vec.training.mining.mine` opens its model with.

    Raises:
        UserError: if Ray is not installed.
    """
    with actors(pool, MineWorker) as workers:
        engine = RayEngine(workers)
        yield lambda model: RayFinder(model, engine)
