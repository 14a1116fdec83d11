"""A whole evaluation: load, check, encode, rank, write. Knows no command line."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec.cache import cache_folder
from vlm2vec.evaluation.benchmark import Benchmark, load_benchmark
from vlm2vec.evaluation.evaluate import TaskResult, check_tasks, evaluate
from vlm2vec.evaluation.processes import joined_processes
from vlm2vec.evaluation.report import write_evaluation
from vlm2vec.evaluation.tasks import TaskReader
from vlm2vec.models.checkpoint import provenance
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.fingerprint import describe
from vlm2vec.progress import progress_bar
from vlm2vec.retrieval.store import EmbeddingStore, default_store
from vlm2vec.types import EmbeddingInput

logger = logging.getLogger(__name__)


@dataclass
class CountingEncoder:
    """An embedder that counts what it encodes, and keeps picture features before their vectors are kept.

    So a run that was killed finds the same features, in the same batches, as one that was not.
    """

    embedder: Embedder
    num_encoded: int = 0

    def encode(self, inputs: Sequence[EmbeddingInput]) -> np.ndarray:
        """Unit-norm vectors [N, D] in input order."""
        vectors = self.embedder.encode(inputs)
        self.num_encoded += len(inputs)
        cache = self.embedder.backbone.vision_cache
        if cache is not None:
            cache.flush()
        return vectors


def score_model(
    model: str,
    benchmark_file: str | Path,
    output: Path,
    data: Path | None = None,
    options: dict[str, Any] | None = None,
    store: Path | None = None,
    names: Sequence[str] = (),
    switches: dict[str, Any] | None = None,
) -> tuple[Benchmark, list[TaskResult]]:
    """Scores a model on a benchmark and writes the results.

    Under `torchrun` every process encodes its share into the common store, and the first one scores and writes.

    Args:
        model: What `Embedder.from_pretrained` takes.
        benchmark_file: A shipped benchmark's name or the path of a YAML file.
        output: Folder for `results.json` and the reports.
        data: Folder of the evaluation sets; None: as the benchmark says.
        options: Settings of the model's family.
        store: Folder of kept vectors; None: in the user's cache.
        names: Tasks; none: all that have a reader.
        switches: Changes to the benchmark's `quirks`.

    Returns:
        The benchmark and one result a task (none on processes other than the first).

    Raises:
        UserError: for bad input; nothing is written then.
    """
    since = time.perf_counter()
    benchmark, folder = load_benchmark(benchmark_file, data)
    benchmark = benchmark.with_switches(switches or {})
    benchmark = benchmark.only(list(names) or [task.name for task in benchmark.tasks if task.reader])
    tasks = TaskReader(benchmark, folder)
    total = check_tasks(tasks)
    with joined_processes() as share:
        if share.rank:
            share.wait()  # the first process prepares what the cache lacks; two would trip over each other
        embedder = Embedder.from_pretrained(model, **(options or {}))
        if share.rank == 0:
            share.wait()
        embedder.backbone.cache_pictures(cache_folder() / "vision")
        about = describe(embedder, model)
        vectors = EmbeddingStore(store or default_store(), about)
        for notice in vectors.notices:
            logger.warning(notice)
        encoder = CountingEncoder(embedder)
        with progress_bar(f"scoring {Path(model).name}", total) as advance:
            results = evaluate(encoder, benchmark, tasks, advance, vectors, share)
    if share.rank == 0:
        size = sum(parameter.numel() for parameter in embedder.parameters())
        facts = {
            "embedding_dimension": embedder.embedding_dim,
            "num_parameters": size,
            **benchmark.facts(folder),
            **about,
        }
        seconds = round(time.perf_counter() - since, 1)
        run = provenance(seconds=seconds, num_encoded=encoder.num_encoded, num_inputs=total)
        write_evaluation(output, model, benchmark, results, facts, run)
    return benchmark, results
