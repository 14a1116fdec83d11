"""Near-duplicates: the groups of a brute-force comparison, with work that grows with the distinct vectors alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm2vec.jobs import duplicates
from vlm2vec.jobs.duplicates import find_duplicates
from vlm2vec.retrieval import near_pairs
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import StoreFacts, VectorStore


def store_of(folder: Path, vectors_ND: np.ndarray) -> VectorStore:
    store = open_store(f"{folder}/s.lance", StoreFacts("toy", "abc", vectors_ND.shape[1]))
    keys = [f"{i:05d}" for i in range(len(vectors_ND))]
    store.add(keys, vectors_ND, [{"number": i} for i in range(len(vectors_ND))])
    return store


def grouped_by_hand(vectors_ND: np.ndarray, threshold: float) -> list[list[int]]:
    unit_ND = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    near = unit_ND @ unit_ND.T >= threshold
    near |= (vectors_ND[:, None] == vectors_ND[None]).all(axis=2)
    left, groups = set(range(len(near))), []
    while left:
        group, border = set(), [min(left)]
        while border:
            row = border.pop()
            if row not in group:
                group.add(row)
                border += np.flatnonzero(near[row]).tolist()
        left -= group
        groups += [sorted(group)] if len(group) > 1 else []
    return sorted(groups, key=lambda rows: (-len(rows), rows[0]))


@settings(max_examples=15)
@given(seed=st.integers(0, 999), count=st.integers(1, 60), threshold=st.sampled_from([-1.0, 0.3, 0.8, 0.99, 1.0]))
def test_groups_are_those_of_all_pairs(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, threshold: float
) -> None:
    random = np.random.default_rng(seed)
    vectors_ND = random.integers(-2, 3, (count, 3)).astype(np.float32)
    vectors_ND[(vectors_ND == 0).all(axis=1)] = 1
    store = store_of(tmp_path_factory.mktemp("d"), vectors_ND)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_pairs, "BLOCK", 7)
        groups = find_duplicates(store, threshold)
    found = [[int(hit.key) for hit in group.hits] for group in groups]
    # whole numbers: an exact cosine may round to either side of a threshold of 1
    assert threshold == 1.0 or found == grouped_by_hand(vectors_ND, threshold)
    assert all(hit.metadata == {"number": int(hit.key)} for group in groups for hit in group.hits)


def test_a_long_chain_of_near_rows_is_one_group(tmp_path: Path) -> None:
    angles = np.linspace(0, np.pi / 2, 500)
    store = store_of(tmp_path, np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    (group,) = find_duplicates(store, float(np.cos(1.5 * angles[1])))
    assert len(group.hits) == 500 and group.hits[-1].score == pytest.approx(0, abs=1e-6)


def test_equal_rows_are_compared_once_and_their_metadata_takes_one_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    copies = np.repeat(random.normal(size=(3, 8)), 400, axis=0)
    store = store_of(tmp_path, np.concatenate([copies, random.normal(size=(40, 8))]).astype(np.float32))
    compared: list[int] = []
    scans: list[object] = []
    components, scan, fetch = duplicates._components, type(store).scan, type(store).fetch
    monkeypatch.setattr(
        duplicates, "_components", lambda rows, *rest: compared.append(len(rows)) or components(rows, *rest)
    )
    monkeypatch.setattr(
        type(store), "scan", lambda self, *args, **options: scans.append(args) or scan(self, *args, **options)
    )
    monkeypatch.setattr(type(store), "fetch", lambda self, keys, *rest, **options: pytest.fail("fetched by key"))
    done: list[int] = []
    groups = find_duplicates(store, 0.999, progress=done.append)
    assert [len(group.hits) for group in groups] == [400, 400, 400]
    assert compared == [43] and len(scans) == 2 and sum(done) == 1240
    monkeypatch.setattr(type(store), "fetch", fetch)
