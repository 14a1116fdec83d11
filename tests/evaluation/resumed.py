"""A separate process for `test_resume.py`: `python resumed.py BENCHMARK STORE OUTPUT KILL_AT`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlm2vec.evaluation import evaluate as evaluation
from vlm2vec.evaluation.benchmark import load_benchmark
from vlm2vec.evaluation.processes import joined_processes
from vlm2vec.evaluation.report import write_evaluation
from vlm2vec.retrieval import embedding_cache as caches
from vlm2vec.types import EmbeddingInput

PART = 8


class FussyEncoder:
    """Guesses by content, and as a real model in low precision does: its vectors depend a little on the batch."""

    num_encoded = 0

    def encode(self, inputs: Sequence[EmbeddingInput]) -> np.ndarray:
        self.num_encoded += len(inputs)
        seeds = [int.from_bytes(caches.InputKeys()(item)[:4], "big") for item in inputs]
        vectors = np.stack([np.random.default_rng(seed).normal(size=3) for seed in seeds])
        vectors += np.random.default_rng(sum(seeds)).normal(size=3)
        return vectors.astype(np.float32)


def kill_before(number: int) -> None:
    """SIGKILL when the vectors of a part are written and its keys are not."""
    write, count = caches._write, 0

    def counted(path: Path, content: bytes) -> None:
        nonlocal count
        if path.suffix == ".keys":
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    caches._write = counted


def main() -> None:
    benchmark_file, cache, output, kill_at = sys.argv[1:]
    evaluation.PART = PART
    kill_before(int(kill_at))
    benchmark, folder = load_benchmark(benchmark_file)
    tasks = evaluation.TaskReader(benchmark, folder)
    encoder = FussyEncoder()
    about = {"model": "fussy"}
    with joined_processes() as share:
        results = evaluation.evaluate(
            encoder, benchmark, tasks, cache=caches.EmbeddingCache(Path(cache), about), share=share
        )
    if share.rank == 0:
        write_evaluation(Path(output), "fussy", benchmark, results, about)
    sys.stdout.write(f"encoded {encoder.num_encoded}\n")


if __name__ == "__main__":
    main()
