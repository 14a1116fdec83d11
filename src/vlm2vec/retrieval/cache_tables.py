"""The embedding cache as Arrow tables, which other programs take without a second copy on disk.

`vlm2vec eval` and `vlm2vec mine` keep vectors in the cache, written in shards by every process (or Ray worker) itself.

    from vlm2vec.retrieval.cache_folder import default_cache, list_cache

    folder = default_cache() / list_cache(default_cache())[0].fingerprint  # the vectors used last
    lancedb.connect("db").create_table("vectors", data=cache_reader(folder))

Shapes: N vectors of a shard, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlm2vec.errors import UserError
from vlm2vec.retrieval.cache_folder import KEY_BYTES, is_keys_file


def cache_reader(folder: Path) -> pa.RecordBatchReader:
    """A reader of all vectors of one fingerprint, a batch for each shard; one shard is open at a time.

    Args:
        folder: Folder of a fingerprint, inside the embedding cache.

    Returns:
        Reader of the columns `key` (hexadecimal; `InputKeys()(item).hex()` is that of an input) and `vector`. A key
        that two processes wrote appears once.

    Raises:
        UserError: if the folder has no vectors.
    """
    shards = sorted(path for path in folder.glob("*.keys") if is_keys_file(path.name))
    if not shards:
        raise UserError(f"{folder}: no cached vectors; expected a folder that vlm2vec cache ls lists")
    dim = np.load(shards[0].with_suffix(".npy"), mmap_mode="r", allow_pickle=False).shape[1]
    schema = pa.schema([("key", pa.string()), ("vector", pa.list_(pa.float32(), dim))])
    return pa.RecordBatchReader.from_batches(schema, _batches(shards, schema))


def _batches(shards: list[Path], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    seen: set[bytes] = set()
    for shard in shards:
        content = shard.read_bytes()
        keys = [content[start : start + KEY_BYTES] for start in range(0, len(content), KEY_BYTES)]
        new = [row for row, key in enumerate(keys) if key not in seen]
        seen.update(keys)
        vectors_ND = np.load(shard.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)[new]
        flat = pa.array(np.ascontiguousarray(vectors_ND, np.float32).reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(flat, schema.field("vector").type.list_size)
        yield pa.record_batch([pa.array([keys[row].hex() for row in new], pa.string()), vectors], schema=schema)
