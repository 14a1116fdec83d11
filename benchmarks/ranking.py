"""Compares exact ranking in blocks, where bfloat16 products select the pairs to score exactly, with one matrix product
and a full argsort as in the reference evaluation. Both use the same vectors and must give equal ranks.

    python benchmarks/ranking.py [--queries 1000] [--candidates 100000] [--dim 1536] [--repeats 3]

The scores take at least 2 x 1,000 x 100,000 x 1,536 = 307 GFLOP; sorting adds 1,000 x 100,000 x 17 comparisons.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import torch

from vlm2vec.retrieval.rank import DEPTH, rank_relevant


class PeakMemory:
    """Peak memory above that at the start, sampled every 5 ms."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._most = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._most = max(self._most, self._process.memory_info().rss)

    def stop(self) -> float:
        self._done.set()
        self._thread.join()
        return (self._most - self._before) / 1e6


def unit_rows(count: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def argsort_ranks(queries: np.ndarray, candidates: np.ndarray, golds: list[int]) -> list[int]:
    """Ranks as the reference evaluation does: computes and sorts all scores, then looks up the gold."""
    order = np.argsort(-(queries @ candidates.T), axis=1)
    return [1 + int(np.flatnonzero(row == gold)[0]) for row, gold in zip(order, golds, strict=True)]


def measure(which: str, settings: argparse.Namespace) -> dict[str, float | list[int]]:
    """Runs a method in its own process, so that its peak memory is measured separately."""
    candidates = unit_rows(settings.candidates, settings.dim, 0)
    random = np.random.default_rng(1)
    golds = [int(gold) for gold in random.choice(settings.candidates, settings.queries)]
    # Queries near their gold by differing amounts, so that ranks spread from 1 to beyond the depth.
    queries = unit_rows(settings.queries, settings.dim, 2) + 0.15 * random.random((settings.queries, 1), np.float32) * (
        candidates[golds] * 1.0
    )
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    times, ranks = [], []
    peak = PeakMemory()
    for _ in range(settings.repeats):
        since = time.perf_counter()
        if which == "ours":
            ranks = [mine[0] for mine in rank_relevant(queries, candidates, [[gold] for gold in golds])]
        else:
            ranks = argsort_ranks(queries, candidates, golds)
        times.append(time.perf_counter() - since)
    return {"seconds": min(times), "mb": peak.stop(), "ranks": [min(rank, DEPTH + 1) for rank in ranks]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["ours", "argsort"])
    settings = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if settings.only:
        print(json.dumps(measure(settings.only, settings)))
        return
    found = {}
    for which in ("ours", "argsort"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", which]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[which] = json.loads(done.stdout.splitlines()[-1])
    same = sum(a == b for a, b in zip(found["ours"]["ranks"], found["argsort"]["ranks"], strict=True))
    print(f"{'way':<10}{'seconds':>9}{'extra MB':>10}")
    for which, one in found.items():
        print(f"{which:<10}{one['seconds']:>9.2f}{one['mb']:>10.0f}")
    print(f"equal ranks: {same} of {settings.queries}; hit@1 {np.mean(np.array(found['ours']['ranks']) == 1):.3f}")
    ratio = {"x_argsort": round(found["argsort"]["seconds"] / found["ours"]["seconds"], 2)}
    ratio["rss_x_argsort"] = round(found["argsort"]["mb"] / max(found["ours"]["mb"], 1), 1)
    print(json.dumps(ratio))


if __name__ == "__main__":
    main()
