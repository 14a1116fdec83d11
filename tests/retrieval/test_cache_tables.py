"""Vectors of the embedding cache as Arrow batches: each once, in LanceDB and in Qdrant."""

from __future__ import annotations

from pathlib import Path

import lancedb
import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from vlm2vec.errors import UserError
from vlm2vec.retrieval.cache_tables import cache_reader
from vlm2vec.retrieval.embedding_cache import EmbeddingCache, InputKeys
from vlm2vec.types import EmbeddingInput

ITEMS = [EmbeddingInput(f"text {i}") for i in range(20)]
KEYS = [InputKeys()(item) for item in ITEMS]
VECTORS = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of two processes, which share three inputs; a third process was killed between its two files."""
    about = {"model": "toy"}
    first, second = EmbeddingCache(tmp_path, about), EmbeddingCache(tmp_path, about)
    first.put(KEYS[:12], VECTORS[:12])
    second.put(KEYS[9:], VECTORS[9:])
    np.save(first.folder / "99999999999999999999-dead.npy", VECTORS)
    return first.folder


def test_lancedb_takes_every_vector_once_one_shard_at_a_time(folder: Path, tmp_path: Path) -> None:
    assert [batch.num_rows for batch in cache_reader(folder)] == [12, 8]
    table = lancedb.connect(tmp_path / "db").create_table("vectors", data=cache_reader(folder)).to_arrow()
    found = dict(zip(table["key"].to_pylist(), table["vector"].to_pylist(), strict=True))
    assert list(found) == [key.hex() for key in KEYS] and len(table) == len(found)
    np.testing.assert_array_equal(np.array(list(found.values()), np.float32), VECTORS)


def test_qdrant_takes_every_vector_once(folder: Path) -> None:
    client = QdrantClient(":memory:")
    client.create_collection("vectors", models.VectorParams(size=6, distance=models.Distance.DOT))
    rows = (row for batch in cache_reader(folder) for row in batch.to_pylist())
    client.upload_points(
        "vectors",
        (
            models.PointStruct(id=i, vector=row["vector"], payload={"key": row["key"]})
            for i, row in enumerate(rows)
        ),
    )  # fmt: skip
    points, _ = client.scroll("vectors", limit=100, with_vectors=True)
    assert sorted(point.payload["key"] for point in points) == sorted(key.hex() for key in KEYS)


def test_a_folder_without_vectors_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cached vectors; expected a folder that vlm2vec cache ls lists"):
        cache_reader(tmp_path)
