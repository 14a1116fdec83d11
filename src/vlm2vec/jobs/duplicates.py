"""Near-duplicates of a vector store: groups of rows with a high cosine, the same as by comparing every pair.

Rows with equal vectors are merged before the comparison, so a thousand copies of one image cost as much as one row.
`vlm2vec.retrieval.near_pairs` finds the pairs; pairs that a chain joins already are not compared.

Shapes: N rows, U distinct vectors, D embedding dim.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlm2vec.errors import UserError
from vlm2vec.retrieval.near_pairs import near_pairs
from vlm2vec.retrieval.vector_store import Hit, VectorStore


@dataclass(frozen=True)
class Group:
    """Rows that are near each other, by key. The scores are the cosines to the first row, `hits[0]`."""

    hits: list[Hit]


def find_duplicates(
    store: VectorStore,
    threshold: float,
    where: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Group]:
    """Groups of at least two rows, the largest first. Two rows share a group if a chain of near pairs joins them.

    Args:
        store: All its vectors are read into memory: N · D · 4 bytes.
        threshold: Cosine from which two rows are near.
        where: Compare only the rows of this filter.
        progress: Called with the number of rows compared since the last call.

    Raises:
        UserError: for a threshold that is no cosine.
    """
    if not -1 <= threshold <= 1:
        raise UserError(f"threshold {threshold}: expected a cosine, such as 0.95")
    keys, vectors_ND = _read(store, where)
    first_U, unique_of_N = _distinct(vectors_ND)
    distinct_UD = vectors_ND if len(first_U) == len(vectors_ND) else vectors_ND[first_U]
    near = _components(distinct_UD, threshold, np.bincount(unique_of_N, minlength=len(first_U)), progress)
    groups = _groups(near[unique_of_N], keys)
    about = _metadata(store, [keys[row] for rows in groups for row in rows], len(keys))
    return [_group(rows, keys, vectors_ND, about) for rows in groups]


def _read(store: VectorStore, where: str | None) -> tuple[list[str], np.ndarray]:
    """Keys and their vectors at unit norm, in the order of the store; memory holds the vectors once."""
    keys: list[str] = []
    vectors_ND = np.zeros((store.count(where), store.facts.dim), np.float32)
    for rows in store.scan([], where, vectors=True):
        assert rows.vectors_ND is not None
        norms_N1 = np.maximum(np.linalg.norm(rows.vectors_ND, axis=1, keepdims=True), 1e-12)
        vectors_ND[len(keys) : len(keys) + len(rows.keys)] = rows.vectors_ND / norms_N1
        keys += rows.keys
    return keys, vectors_ND


def _distinct(vectors_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each distinct vector, [U], and for each row the number of its vector, [N]."""
    numbers: dict[bytes, int] = {}
    digests = (hashlib.blake2b(row, digest_size=16).digest() for row in vectors_ND)
    unique_of_N = np.fromiter((numbers.setdefault(digest, len(numbers)) for digest in digests), np.int64)
    _, first_U = np.unique(unique_of_N, return_index=True)
    return first_U, unique_of_N


def _components(
    vectors_UD: np.ndarray, threshold: float, weights_U: np.ndarray, progress: Callable[[int], None]
) -> np.ndarray:
    """For each vector the smallest number of a vector that a chain of near pairs joins it with, [U].

    Args:
        vectors_UD: Distinct vectors of unit norm.
        threshold: Cosine of a near pair.
        weights_U: Rows that have each vector, for the progress.
        progress: Called after each block.
    """
    parent, done = np.arange(len(vectors_UD)), 0

    def apart(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        different: np.ndarray = _roots(parent, left) != _roots(parent, right)
        return different

    for start, left, right in near_pairs(vectors_UD, threshold, apart):
        progress(int(weights_U[done:start].sum()))
        done = start
        _join(parent, left, right)
    progress(int(weights_U[done:].sum()))
    return _roots(parent, np.arange(len(parent)))


def _join(parent: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Joins the trees of all pairs at once; a tree's root is its smallest number.

    Each round hangs the larger root of every pair under the smallest root that a pair joins it with, until no pair has
    two roots. So a block with a million pairs takes a few rounds of array operations.
    """
    while len(left):
        left, right = _roots(parent, left), _roots(parent, right)
        apart = left != right
        left, right = left[apart], right[apart]
        low, high = np.minimum(left, right), np.maximum(left, right)
        np.minimum.at(parent, high, low)
        left, right = low, high


def _roots(parent: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Roots of rows; each round halves the paths to them."""
    while True:
        above: np.ndarray = parent[rows]
        if (parent[above] == above).all():
            return above
        parent[rows] = parent[above]


def _groups(component_N: np.ndarray, keys: list[str]) -> list[np.ndarray]:
    """Rows of each component of at least two, by key; the largest component first, equal ones by their first key."""
    by_key = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    order = by_key[np.argsort(component_N[by_key], kind="stable")]
    begins = np.flatnonzero(np.diff(component_N[order], prepend=-1))
    groups = [rows for rows in np.split(order, begins[1:]) if len(rows) > 1]
    return sorted(groups, key=lambda rows: (-len(rows), keys[rows[0]]))


def _metadata(store: VectorStore, wanted: list[str], num_rows: int) -> dict[str, dict[str, object]]:
    """Metadata of rows by key: few are fetched by key, many are found in one scan."""
    if len(wanted) <= num_rows // 100:
        rows = store.fetch(wanted)
        return dict(zip(rows.keys, rows.metadata, strict=True))
    chosen = set(wanted)
    return {
        key: one
        for rows in store.scan()
        for key, one in zip(rows.keys, rows.metadata, strict=True)
        if key in chosen
    }  # fmt: skip


def _group(rows: np.ndarray, keys: list[str], vectors_ND: np.ndarray, about: dict[str, dict[str, object]]) -> Group:
    scores = vectors_ND[rows] @ vectors_ND[rows[0]]
    hits = [(keys[row], float(score)) for row, score in zip(rows, scores, strict=True)]
    return Group([Hit(key, score, about.get(key, {})) for key, score in hits])
