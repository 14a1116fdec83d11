"""Near-duplicates of a store: groups of rows whose cosines are high. Exact: every pair is compared, in blocks.

Shapes: N rows, B rows of a block, D embedding dim.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlm2vec.errors import UserError
from vlm2vec.retrieval.vector_store import Hit, VectorStore

BLOCK = 2048


@dataclass(frozen=True)
class Group:
    """Rows that are near each other, by key: `hits[0]` is the first, the scores are the cosines to it."""

    hits: list[Hit]


def find_duplicates(
    store: VectorStore,
    threshold: float,
    where: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Group]:
    """Groups of at least two rows, the largest first. Rows are in one group if a chain of near pairs joins them.

    Args:
        store: All its vectors are read into memory: N · D · 4 bytes.
        threshold: Two rows are near from this cosine on.
        where: Only rows of this filter.
        progress: Called with the number of rows compared since the last call.

    Raises:
        UserError: for a threshold that is no cosine.
    """
    if not -1 <= threshold <= 1:
        raise UserError(f"threshold {threshold}: expected a cosine, such as 0.95")
    keys, vectors_ND = _read(store, where)
    parent = list(range(len(keys)))
    for start in range(0, len(keys), BLOCK):
        block_BD = vectors_ND[start : start + BLOCK]
        for other in range(start, len(keys), BLOCK):
            near = np.argwhere(block_BD @ vectors_ND[other : other + BLOCK].T >= threshold)
            for left, right in near[near[:, 0] + start < near[:, 1] + other]:
                a, b = _root(parent, int(left) + start), _root(parent, int(right) + other)
                parent[max(a, b)] = min(a, b)
        progress(len(block_BD))
    members: dict[int, list[int]] = defaultdict(list)
    for row in range(len(keys)):
        members[_root(parent, row)].append(row)
    chosen = sorted((rows for rows in members.values() if len(rows) > 1), key=lambda rows: (-len(rows), keys[rows[0]]))
    return [_group(store, [keys[row] for row in rows], vectors_ND[rows] @ vectors_ND[rows[0]]) for rows in chosen]


def _read(store: VectorStore, where: str | None) -> tuple[list[str], np.ndarray]:
    """Keys in order and their vectors at unit norm."""
    keys: list[str] = []
    blocks = [np.zeros((0, store.facts.dim), np.float32)]
    for rows in store.scan([], where, vectors=True):
        keys += rows.keys
        blocks.append(rows.vectors_ND if rows.vectors_ND is not None else blocks[0])
    vectors_ND = np.concatenate(blocks)
    vectors_ND /= np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return [keys[row] for row in order], vectors_ND[order]


def _root(parent: list[int], row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = parent[row]
    return row


def _group(store: VectorStore, keys: list[str], scores: np.ndarray) -> Group:
    rows = store.fetch(keys)
    return Group([Hit(*one) for one in zip(rows.keys, map(float, scores), rows.metadata, strict=True)])
