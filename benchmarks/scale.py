"""Measures scaling with the number of rows: time, memory and counted work of each job at a size and at twice that size.

    python benchmarks/scale.py [--rows 100000] [--dim 128] [--case NAME ...] [--whole]

Random vectors replace the model, so the results are the cost outside the model. Every case runs in a separate forked
process, at half the rows and at all rows, on one thread. The table has CPU seconds, the exponent of growth between both
sizes (1: linear, 2: quadratic), peak memory of the process, and the counted work. `--whole` leaves out the half.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from scale_toys import Hashed, Work, facts, lines, peak_mib
from scale_training import image_check, mining_all, mining_targets, training_pairs

from vlm2vec.evaluation.benchmark import Benchmark
from vlm2vec.evaluation.evaluate import evaluate
from vlm2vec.jobs.duplicates import find_duplicates
from vlm2vec.jobs.embed import EmbedSettings, Job
from vlm2vec.jobs.indexing import index_source
from vlm2vec.jobs.loading import load_parts
from vlm2vec.jobs.sources import open_source
from vlm2vec.retrieval.embedding_cache import EmbeddingCache, InputKeys, fill
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.rank import rank_relevant
from vlm2vec.retrieval.vector_store import VectorStore
from vlm2vec.types import EmbeddingInput, EvalQuery, content_key

EQUAL_SHARE = 0.2  # fraction of the rows that share a vector, for duplicates
QUERIES = 200


def eval_cache(folder: Path, rows: int, dim: int) -> Work:
    """The embedding cache of an evaluation: written in shards of 512, reopened, read in blocks."""
    items = {content_key(item): item for item in (EmbeddingInput(f"text {row}") for row in range(rows))}
    cache = EmbeddingCache(folder / "cache", {"model": "random"})
    num_encoded = fill(cache, items, Hashed(dim).encode_document)
    reopened = EmbeddingCache(folder / "cache", {"model": "random"}).rows(list(items))
    for start in range(0, rows, 8192):
        reopened[start : start + 8192]
    return {"encoded": num_encoded, "open files": len(list(Path("/proc/self/fd").iterdir()))}


def embed(folder: Path, rows: int, dim: int) -> Work:
    """`vlm2vec embed` to parquet, one bad row in 1,024."""
    encoder, source = Hashed(dim), open_source(lines(folder, rows))
    since = time.process_time()
    job = Job(source, folder / "out.parquet", EmbedSettings(), facts(dim))
    job.run(encoder)
    report = job.finish()
    seconds = time.process_time() - since
    return {"seconds": seconds, "encoded": encoder.num_encoded, "errors": len(report.errors)}


def index(folder: Path, rows: int, dim: int) -> Work:
    """`vlm2vec index` of a new store."""
    encoder, source = Hashed(dim), open_source(lines(folder, rows))
    since = time.process_time()
    index_source(encoder, source, open_store(f"{folder}/s.lance", facts(dim)))
    seconds = time.process_time() - since
    return {"seconds": seconds, "encoded": encoder.num_encoded, "ms a part of 512": round(seconds / rows * 512e3, 1)}


def index_again(folder: Path, rows: int, dim: int) -> Work:
    """`vlm2vec index` of an indexed folder of files, 10 of which changed."""
    photos = folder / "texts"
    for row in range(rows):
        path = photos / f"{row // 1000:04d}/{row:07d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {row}")
    index_source(Hashed(dim), open_source(photos), open_store(f"{folder}/s.lance", facts(dim)))
    for row in range(10):
        (photos / f"0000/{row:07d}.txt").write_text(f"text {row} changed")
    encoder, since = Hashed(dim), time.process_time()
    report = index_source(encoder, open_source(photos), open_store(f"{folder}/s.lance", facts(dim)))
    return {"seconds": time.process_time() - since, "encoded": encoder.num_encoded, "unchanged": report.num_same}


def load(folder: Path, rows: int, dim: int) -> Work:
    """`vlm2vec load` of a folder of parts into a new store; bytes on disk, the parts not included."""
    job = Job(open_source(lines(folder, rows)), folder / "vectors", EmbedSettings(), facts(dim))
    job.run(Hashed(dim))
    job.finish()
    since = time.process_time()
    report = load_parts(folder / "vectors", f"{folder}/s.lance", "exact")
    seconds = time.process_time() - since
    size = sum(file.stat().st_size for file in (folder / "s.lance").rglob("*") if file.is_file())
    return {"seconds": seconds, "rows in the store": report.num_rows, "bytes a row": round(size / report.num_rows)}


def filled_store(folder: Path, vectors_ND: np.ndarray) -> VectorStore:
    """A store with these vectors."""
    store = open_store(f"{folder}/s.lance", facts(vectors_ND.shape[1]))
    for start in range(0, len(vectors_ND), 8192):
        part = vectors_ND[start : start + 8192]
        store.add([f"{start + i:08d}" for i in range(len(part))], part, [{"path": "photo.jpg"}] * len(part))
    return store


def duplicates(folder: Path, rows: int, dim: int) -> Work:
    """`vlm2vec duplicates` where a fifth of the rows share one vector."""
    random = np.random.default_rng(0)
    vectors_ND = random.standard_normal((rows, dim), np.float32)
    vectors_ND[random.random(rows) < EQUAL_SHARE] = vectors_ND[0]
    store, since = filled_store(folder, vectors_ND), time.process_time()
    groups = find_duplicates(store, 0.95)
    return {"seconds": time.process_time() - since, "groups": len(groups), "largest": len(groups[0].hits)}


def ranking(folder: Path, rows: int, dim: int) -> Work:
    """Ranks of 1,000 queries among all rows."""
    random = np.random.default_rng(0)
    candidates_MD = random.standard_normal((rows, dim), np.float32)
    golds = random.integers(rows, size=1000).tolist()
    queries_BD = candidates_MD[golds] + random.standard_normal((1000, dim), np.float32)
    since = time.process_time()
    ranks = rank_relevant(queries_BD, candidates_MD, [[gold] for gold in golds])
    return {"seconds": time.process_time() - since, "rank 1": sum(rank == [1] for rank in ranks)}


def recall(folder: Path, rows: int, dim: int) -> Work:
    """Recall@10 of the default index of large stores, and milliseconds per query."""
    random = np.random.default_rng(0)
    centers = random.standard_normal((max(rows // 50, 2), dim), np.float32)
    noisy = centers[random.integers(len(centers), size=rows + QUERIES)]
    noisy += random.standard_normal((rows + QUERIES, dim), np.float32) * 0.6
    store = filled_store(folder, noisy[:rows])
    chosen = store.build_index("IVF_RQ")
    found, since = [], time.perf_counter()
    for query in noisy[rows:]:
        found.append({hit.key for hit in store.search(query, 10)})
    ms = (time.perf_counter() - since) / QUERIES * 1000
    exact = [{hit.key for hit in store.search(query, 10, exact=True)} for query in noisy[rows:]]
    share = np.mean([len(mine & true) / 10 for mine, true in zip(found, exact, strict=True)])
    return {"index": chosen.kind, "recall@10": round(float(share), 4), "ms a query": round(ms, 1)}


def local_ranking(folder: Path, rows: int, dim: int) -> Work:
    """Queries with 1,000 candidates of their own, ranked at a rerun: vectors of 1,536 dimensions, `rows` scores."""
    random, dim = np.random.default_rng(0), 1536
    items = [EmbeddingInput(f"candidate {i}") for i in range(20_000)]
    queries = [EmbeddingInput(f"query {i}") for i in range(rows // 1000)]
    key_of, cache = InputKeys(), EmbeddingCache(folder, {"model": "random"})
    fill(cache, {key_of(item): item for item in [*items, *queries]}, Hashed(dim).encode_document)
    asked = [EvalQuery(query, tuple(items[i] for i in random.permutation(20_000)[:1000])) for query in queries]
    benchmark = Benchmark.model_validate({"name": "random", "tasks": [{"name": "local"}], "source": {"eval": "."}})
    since = time.process_time()
    evaluate(Hashed(dim), benchmark, {"local": asked}, cache=cache)
    seconds = time.process_time() - since
    return {"seconds": seconds, "ms a query": round(seconds / len(queries) * 1000, 2)}


def serve(folder: Path, rows: int, dim: int) -> Work:
    """Memory of `vlm2vec serve`; imported here, so that the other cases hold no server."""
    from scale_models import serving

    return serving(folder, rows)


CASES: dict[str, Callable[[Path, int, int], Work]] = {
    "eval: embedding cache": eval_cache,
    "embed, 1 bad row in 1,024": embed,
    "index": index,
    "load a folder of vectors": load,
    "index again, 10 files changed": index_again,
    "duplicates, a fifth equal": duplicates,
    "ranking, 1,000 queries": ranking,
    "ranking, 1,000 candidates a query": local_ranking,
    "training pairs": training_pairs,
    "images before the first step": image_check,
    "search through the index": recall,
    "server, distinct texts": serve,
    "mine, 4,096 pairs": mining_targets,
    "mine, all pairs of 5,000 targets": mining_all,
}


def measure(name: str, rows: int, dim: int) -> Work:
    """One case in a forked process; a case that prepares data reports its own seconds."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    child = fork.Process(target=_measured, args=(name, rows, dim, theirs))
    child.start()
    theirs.close()
    found: Work = ours.recv()
    child.join()
    return found


def _measured(name: str, rows: int, dim: int, answer: Connection) -> None:
    with tempfile.TemporaryDirectory() as folder:
        since = time.process_time()
        work = CASES[name](Path(folder), rows, dim)
        seconds = work.pop("seconds", time.process_time() - since)
        answer.send({"seconds": seconds, "MiB": peak_mib(), "work": work})


def table(measured: Iterable[tuple[str, int, Work | None, Work]]) -> Iterable[str]:
    """Lines of a Markdown table: a case, the seconds at both sizes, exponent, memory, work."""
    yield "| case | rows | CPU s | CPU s at half | exponent | peak MiB | counted |"
    yield "|---|--:|--:|--:|--:|--:|---|"
    for name, rows, half, whole in measured:
        growth = " | "
        if half is not None:
            exponent = math.log2(max(whole["seconds"], 1e-3) / max(half["seconds"], 1e-3))
            growth = f"{half['seconds']:.1f} | {exponent:.2f}"
        counted = ", ".join(
            f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in whole["work"].items()
        )
        yield (f"| {name} | {rows:,} | {whole['seconds']:.1f} | {growth} | {whole['MiB']:,.0f} | {counted} |")


def main() -> None:
    """Measures every case at both sizes and prints the table and a JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--whole", action="store_true", help="leave out the measurement at half the rows")
    settings = parser.parse_args()
    os.environ["LANCE_CPU_THREADS"] = "1"
    torch.set_num_threads(1)
    measured = []
    for name in settings.case:
        half = None if settings.whole else measure(name, settings.rows // 2, settings.dim)
        whole = measure(name, settings.rows, settings.dim)
        measured.append((name, settings.rows, half, whole))
        print(f"{name}: {whole}", file=sys.stderr, flush=True)
    print("\n".join(table(measured)))
    print(json.dumps({name: whole for name, _, _, whole in measured}))


if __name__ == "__main__":
    main()
