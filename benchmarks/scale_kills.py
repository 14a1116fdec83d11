"""Kills `eval`, `embed` and `index` in the middle and starts them again: no row may be lost or doubled.

    python benchmarks/scale_kills.py [--rows 200000] [--dim 32]

Random vectors replace the model. Each job runs in a forked process, which is killed (SIGKILL) when about half of the
rows are on disk; a second process resumes. The table has the rows that the second run encoded, and what is wrong with
the result: rows lost, rows twice, and vectors that differ from those of the encoder.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scale_toys import BAD_EVERY, Hashed, facts, lines

from vlm2vec.jobs.embed import EmbedSettings, Job
from vlm2vec.jobs.index_writer import FIRST_PART, PART
from vlm2vec.jobs.indexing import index_source
from vlm2vec.jobs.sources import open_source
from vlm2vec.retrieval.embedding_cache import EmbeddingCache, fill
from vlm2vec.retrieval.open import open_store
from vlm2vec.types import EmbeddingInput, content_key

POLL_SECONDS = 0.02
SHARD_KEYS = "*/[!.]*.keys"  # not those still being written, which are renamed while this looks at them
Keys = list[str]


def texts(rows: int) -> dict[str, EmbeddingInput]:
    """The inputs of the table by key."""
    return {str(row): EmbeddingInput(f"text {row}") for row in range(rows) if row % BAD_EVERY != 7}


def eval_job(folder: Path, rows: int, encoder: Hashed) -> None:
    """Fills the embedding cache."""
    items = {content_key(item): item for item in texts(rows).values()}
    fill(EmbeddingCache(folder / "cache", {"model": "random"}), items, encoder.encode)


def eval_done(folder: Path) -> int:
    """Vectors on disk."""
    return sum(file.stat().st_size // 32 for file in (folder / "cache").glob(SHARD_KEYS))


def eval_rows(folder: Path, rows: int, dim: int) -> tuple[Keys, np.ndarray]:
    """Every key on disk as the number of its row, and the vectors in row order."""
    row_of = {content_key(item): key for key, item in texts(rows).items()}
    found = [file.read_bytes() for file in (folder / "cache").glob(SHARD_KEYS)]
    keys = [row_of[part[i : i + 32]] for part in found for i in range(0, len(part), 32)]
    in_order = sorted(set(keys), key=int)
    by_row = {key: content for content, key in row_of.items()}
    cache = EmbeddingCache(folder / "cache", {"model": "random"})
    return keys, cache.rows([by_row[key] for key in in_order])[:]


def embed_job(folder: Path, rows: int, encoder: Hashed) -> None:
    """`vlm2vec embed` to parquet."""
    job = Job(open_source(folder / "rows.jsonl"), folder / "out.parquet", EmbedSettings(), facts(encoder.dim))
    job.run(encoder)
    job.finish()


def embed_done(folder: Path) -> int:
    """Rows in finished parts."""
    return EmbedSettings().part * len(list((folder / "out.parquet.parts").glob("part-*.parquet")))


def embed_rows(folder: Path, rows: int, dim: int) -> tuple[Keys, np.ndarray]:
    """Keys of the output, and its vectors in row order."""
    table = pq.read_table(folder / "out.parquet", columns=["key", "vector"])
    vectors_ND = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, dim)
    return _in_order(table["key"].to_pylist(), vectors_ND)


def index_job(folder: Path, rows: int, encoder: Hashed) -> None:
    """`vlm2vec index` of a new store."""
    index_source(encoder, open_source(folder / "rows.jsonl"), open_store(f"{folder}/s.lance", facts(encoder.dim)))


def index_done(folder: Path) -> int:
    """Rows of finished commits, from the number of data files. The first part measures the encoder's speed."""
    num_files = len(list((folder / "s.lance").rglob("data/*.lance")))
    return FIRST_PART + PART * (num_files - 1) if num_files else 0


def index_rows(folder: Path, rows: int, dim: int) -> tuple[Keys, np.ndarray]:
    """Keys of the store without the path of the source, and its vectors in row order."""
    keys: Keys = []
    parts = []
    for found in open_store(f"{folder}/s.lance", facts(dim)).scan((), vectors=True):
        keys += [key.rpartition("#")[2] for key in found.keys]
        parts.append(found.vectors_ND)
    return _in_order(keys, np.concatenate(parts))


def _in_order(keys: Keys, vectors_ND: np.ndarray) -> tuple[Keys, np.ndarray]:
    return keys, vectors_ND[np.argsort([int(key) for key in keys], kind="stable")]


JOBS: dict[str, tuple[Callable[..., None], Callable[[Path], int], Callable[..., tuple[Keys, np.ndarray]]]] = {
    "eval": (eval_job, eval_done, eval_rows),
    "embed": (embed_job, embed_done, embed_rows),
    "index": (index_job, index_done, index_rows),
}


def _run(name: str, folder: Path, rows: int, dim: int, answer: Connection) -> None:
    encoder = Hashed(dim)
    JOBS[name][0](folder, rows, encoder)
    answer.send(encoder.num_encoded)


def killed_and_resumed(name: str, folder: Path, rows: int, dim: int) -> str:
    """A line of the table."""
    lines(folder, rows)
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    first = fork.Process(target=_run, args=(name, folder, rows, dim, theirs))
    first.start()
    while JOBS[name][1](folder) < rows // 2 and first.is_alive():
        time.sleep(POLL_SECONDS)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    kept = JOBS[name][1](folder)
    second = fork.Process(target=_run, args=(name, folder, rows, dim, theirs))
    second.start()
    encoded = ours.recv()
    second.join()
    keys, vectors_ND = JOBS[name][2](folder, rows, dim)
    expected = texts(rows)
    lost, twice = len(expected.keys() - set(keys)), len(keys) - len(set(keys))
    true_ND = Hashed(dim).encode(list(expected.values()))
    differ = int((~np.isclose(vectors_ND, true_ND, atol=1e-6).all(axis=1)).sum()) if not lost and not twice else "?"
    return f"| `{name}` | {len(expected):,} | {kept:,} | {encoded:,} | {lost} | {twice} | {differ} |"


def main() -> None:
    """Prints the table; ends with status 1 if a row was lost, doubled or changed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--job", nargs="+", choices=list(JOBS), default=list(JOBS))
    settings = parser.parse_args()
    print("| job | rows | on disk at the kill | encoded by the second run | lost | twice | changed vectors |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    bad = False
    for name in settings.job:
        with tempfile.TemporaryDirectory() as folder:
            line = killed_and_resumed(name, Path(folder), settings.rows, settings.dim)
        print(line, flush=True)
        bad |= not line.endswith("| 0 | 0 | 0 |")
    raise SystemExit(int(bad))


if __name__ == "__main__":
    main()
