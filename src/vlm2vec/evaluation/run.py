"""A whole evaluation: load, check, encode, rank, write. Knows no command line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from vlm2vec.cache import cache_folder
from vlm2vec.evaluation.benchmark import Benchmark, load_benchmark
from vlm2vec.evaluation.evaluate import TaskResult, evaluate, num_distinct, pictures_of, read_tasks
from vlm2vec.evaluation.report import write_evaluation
from vlm2vec.models.checkpoint import provenance
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.pictures import read_pictures
from vlm2vec.progress import progress_bar


def score_model(
    model: str, benchmark_file: Path, output: Path, data: Path | None = None, options: dict[str, Any] | None = None
) -> tuple[Benchmark, list[TaskResult]]:
    """Scores a model on a benchmark and writes the results.

    Args:
        model: What `Embedder.from_pretrained` takes.
        benchmark_file: The benchmark's YAML.
        output: Folder for `results.json` and the reports.
        data: Folder of the evaluation sets; None: as the benchmark says.
        options: Settings of the model's family.

    Raises:
        UserError: for bad input; nothing is written then.
    """
    since = time.perf_counter()
    benchmark, folder = load_benchmark(benchmark_file, data)
    tasks = read_tasks(benchmark, folder)
    embedder = Embedder.from_pretrained(model, **(options or {}))
    embedder.backbone.cache_pictures(cache_folder() / "vision")
    pictures = dict.fromkeys(pictures_of(tasks))
    with progress_bar("checking and encoding pictures", len(pictures)) as advance:
        read_pictures(embedder, pictures, advance)
    with progress_bar(f"scoring {Path(model).name}", num_distinct(tasks)) as advance:
        results = evaluate(embedder, benchmark, tasks, advance)
    about = provenance(seconds=round(time.perf_counter() - since, 1), dtype=str(embedder.dtype))
    write_evaluation(output, model, benchmark, results, about)
    return benchmark, results
