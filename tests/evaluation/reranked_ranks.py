"""A rank of `test_second_stage.py` under torchrun: `reranked_ranks.py BENCHMARK CACHE OUTPUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from evaluation.toys import ColourEncoder, RandomEncoder

from vlm2vec.evaluation import evaluate as evaluation
from vlm2vec.evaluation.benchmark import load_benchmark
from vlm2vec.evaluation.processes import joined_processes
from vlm2vec.evaluation.report import write_evaluation
from vlm2vec.evaluation.second_stage import SecondStage
from vlm2vec.retrieval.embedding_cache import EmbeddingCache

ABOUT = {"model": "toy reranker"}


class NoisyRanker:
    """Scores by colour and by length of the query's text, so that some queries are ranked wrong."""

    num_scored = 0

    def score(self, query: Any, candidates: Any, *, on_error: Any) -> np.ndarray:
        self.num_scored += len(candidates)
        asked, *found = ColourEncoder().encode([query, *candidates]).argmax(axis=1)
        shift = len(query.text) % 3
        return np.array([float((colour + shift) % 10 == asked) for colour in found], np.float32)


def main() -> None:
    benchmark_file, cache, output = sys.argv[1:]
    benchmark, folder = load_benchmark(benchmark_file)
    tasks = evaluation.TaskReader(benchmark, folder)
    ranker = NoisyRanker()
    second = SecondStage(ranker, EmbeddingCache(Path(cache), ABOUT), 5, ABOUT)
    vectors = EmbeddingCache(Path(cache), {"model": "toy"})
    with joined_processes() as share:
        results = evaluation.evaluate(RandomEncoder(), benchmark, tasks, cache=vectors, share=share, second=second)
    if share.rank == 0:
        write_evaluation(Path(output), "toy", benchmark, results, ABOUT)
    sys.stdout.write(f"scored {ranker.num_scored}\n")


if __name__ == "__main__":
    main()
