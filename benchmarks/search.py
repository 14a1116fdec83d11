"""Compares vector stores: recall@10 against exact search, queries per second, build time and bytes per vector.

    python benchmarks/search.py [--sizes 20000 100000] [--dim 384] [--queries 200] [--precisions float32] [--qdrant]

Vectors are clustered, as those of images are: a row is the center of one of N / 50 clusters plus noise, at unit norm
(seed 0, centers 2). Queries are drawn the same way (seed 1) and are not in the store. The ground truth is a product
in numpy with all float32 vectors; it is also a row of the table, the lower bound for an exact search in memory.
Queries run one at a time, k = 10, through the store's own `search`, so the time includes the metadata of the results.
Disk is the store's folder after `build_index`. `--qdrant` adds Qdrant's local mode, which has no index and is meant
for at most 20,000 rows: larger sizes leave it out, and writing 20,000 rows takes minutes.

An exact search reads N x D x 4 bytes per query: 31 MB for 20,000 x 384.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from vlm2vec.retrieval.lance_store import KINDS
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import Hit, StoreFacts, VectorStore

K = 10
ROWS_A_CLUSTER = 50
NOISE = 0.8  # a row's cosine to its centre is about 1 / sqrt(1 + NOISE²)
ROWS_AT_ONCE = 10_000
QDRANT_LOCAL_ROWS = 20_000
WARM_UP = 5


@dataclass
class Figures:
    """A row of the table."""

    way: str
    precision: str
    recall: float
    per_second: float
    cpu_ms: float
    write_s: float = 0.0
    build_s: float = 0.0
    data_bytes: float = 0.0
    index_bytes: float = 0.0


def clustered(count: int, centres_CD: np.ndarray, seed: int) -> np.ndarray:
    """Unit vectors [count, D] around the centers."""
    random = np.random.default_rng(seed)
    dim = centres_CD.shape[1]
    rows = random.standard_normal((count, dim), dtype=np.float32) * np.float32(NOISE / dim**0.5)
    rows += centres_CD[random.integers(len(centres_CD), size=count)]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Product:
    """All vectors in memory, one product per query."""

    def __init__(self, vectors_ND: np.ndarray) -> None:
        self._vectors_ND = vectors_ND

    def search(self, query_D: np.ndarray, k: int) -> list[Hit]:
        """The k nearest rows, best first."""
        scores = self._vectors_ND @ query_D
        best = np.argpartition(-scores, k)[:k]
        return [Hit(str(row), float(scores[row]), {}) for row in best[np.argsort(-scores[best])]]


def timed(store: VectorStore | Product, queries_QD: np.ndarray) -> tuple[list[list[str]], float, float]:
    """Keys found for every query, queries per second of wall-clock time, and CPU milliseconds per query."""
    for query in queries_QD[:WARM_UP]:
        store.search(query, K)
    since, cpu_since = time.perf_counter(), time.process_time()
    found = [[hit.key for hit in store.search(query, K)] for query in queries_QD]
    seconds, cpu = time.perf_counter() - since, time.process_time() - cpu_since
    return found, len(queries_QD) / seconds, 1000 * cpu / len(queries_QD)


def recall(found: list[list[str]], truth: list[list[str]]) -> float:
    """Fraction of the true nearest rows that was found."""
    return float(np.mean([len(set(mine) & set(true)) / K for mine, true in zip(found, truth, strict=True)]))


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write(uri: str, vectors_ND: np.ndarray, precision: str) -> tuple[VectorStore, float]:
    """A new store with all rows, and the seconds to write it."""
    facts = StoreFacts("benchmark", "0", vectors_ND.shape[1], precision)
    since = time.perf_counter()
    store = open_store(uri, create=facts)
    for start in range(0, len(vectors_ND), ROWS_AT_ONCE):
        part = vectors_ND[start : start + ROWS_AT_ONCE]
        keys = [str(row) for row in range(start, start + len(part))]
        store.add(keys, part, [{"path": f"photos/{key}.jpg"} for key in keys])
    return store, time.perf_counter() - since


def lance_ways(
    folder: Path, vectors_ND: np.ndarray, queries_QD: np.ndarray, truth: list[list[str]], precision: str
) -> Iterator[Figures]:
    """LanceDB, exact and with every index, each on its own copy of one store.

    float16 has the default index only: building IVF_PQ on 20,000 rows did not finish within a minute.
    """
    plain = folder / f"plain-{precision}.lance"
    _, write_s = write(str(plain), vectors_ND, precision)
    for kind in ("exact", *(KINDS if precision == "float32" else KINDS[:1])):
        copy = folder / "copy" / f"{kind}-{precision}.lance"
        shutil.copytree(plain, copy)
        store = open_store(str(copy))
        since = time.perf_counter()
        store.build_index(kind)
        build_s = time.perf_counter() - since
        found, per_second, cpu_ms = timed(store, queries_QD)
        index = size_of(copy / "_indices") if (copy / "_indices").exists() else 0
        yield Figures(
            f"LanceDB {kind}",
            precision,
            recall(found, truth),
            per_second,
            cpu_ms,
            write_s,
            build_s,
            (size_of(copy) - index) / len(vectors_ND),
            index / len(vectors_ND),
        )
        shutil.rmtree(copy)
    shutil.rmtree(plain)


def qdrant_way(
    folder: Path, vectors_ND: np.ndarray, queries_QD: np.ndarray, truth: list[list[str]], precision: str
) -> Figures:
    """Qdrant's local mode in a folder."""
    place = folder / f"qdrant-{precision}"
    store, write_s = write(f"qdrant://{place}/photos", vectors_ND, precision)
    found, per_second, cpu_ms = timed(store, queries_QD)
    store.close()
    data = size_of(place) / len(vectors_ND)
    shutil.rmtree(place)
    return Figures("Qdrant local", precision, recall(found, truth), per_second, cpu_ms, write_s, 0.0, data)


def numpy_way(vectors_ND: np.ndarray, queries_QD: np.ndarray) -> tuple[Figures, list[list[str]]]:
    """The lower bound and the ground truth."""
    truth, per_second, cpu_ms = timed(Product(vectors_ND), queries_QD)
    return Figures("numpy, in memory", "float32", 1.0, per_second, cpu_ms), truth


def measure(size: int, settings: argparse.Namespace) -> Iterator[Figures]:
    """All stores at one size."""
    centres = clustered(max(size // ROWS_A_CLUSTER, 2), np.zeros((1, settings.dim), np.float32), 2)
    vectors, queries = clustered(size, centres, 0), clustered(settings.queries, centres, 1)
    floor, truth = numpy_way(vectors, queries)
    yield floor
    with tempfile.TemporaryDirectory() as name:
        for precision in settings.precisions:
            yield from lance_ways(Path(name), vectors, queries, truth, precision)
        if settings.qdrant and size <= QDRANT_LOCAL_ROWS:
            yield qdrant_way(Path(name), vectors, queries, truth, "float32")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000])
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--precisions", nargs="+", default=["float32", "float16"])
    parser.add_argument("--qdrant", action="store_true", help="Qdrant's local mode, too.")
    settings = parser.parse_args()
    print(", ".join(f"{name} {version(name)}" for name in ("lancedb", "qdrant-client", "numpy")))
    heads = ("recall@10", "queries/s", "CPU ms/query", "write s", "build s", "data B/vector", "index B/vector")
    ratios = {}
    for size in settings.sizes:
        print(
            f"\n{size:,} vectors of {settings.dim}\n{'way':<22}{'precision':<10}" + "".join(f"{h:>15}" for h in heads)
        )
        speed = {}
        for one in measure(size, settings):
            numbers = (
                one.recall,
                one.per_second,
                one.cpu_ms,
                one.write_s,
                one.build_s,
                one.data_bytes,
                one.index_bytes,
            )
            cells = "".join(f"{x:>15.{digits}f}" for x, digits in zip(numbers, (3, 0, 2, 1, 1, 0, 0), strict=True))
            print(f"{one.way:<22}{one.precision:<10}{cells}", flush=True)
            speed.setdefault(one.way, one.per_second)
        ours = speed["LanceDB exact"]
        for way, peer in (("numpy, in memory", "numpy"), ("Qdrant local", "qdrant_local")):
            if way in speed:
                ratios[f"x_{peer}_{size}"] = round(ours / speed[way], 2)
        ratios[f"x_exact_{size}"] = round(speed[f"LanceDB {KINDS[0]}"] / ours, 2)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
