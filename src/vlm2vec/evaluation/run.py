"""A whole evaluation: load, check, encode, rank, write. Independent of the command line."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm2vec.cache import cache_folder
from vlm2vec.evaluation.benchmark import Benchmark, load_benchmark
from vlm2vec.evaluation.evaluate import FillCache, TaskResult, check_tasks, evaluate, filling
from vlm2vec.evaluation.processes import joined_processes
from vlm2vec.evaluation.report import write_evaluation
from vlm2vec.evaluation.second_stage import RerankOptions, open_second_stage
from vlm2vec.evaluation.tasks import TaskReader
from vlm2vec.models.checkpoints.folder import provenance
from vlm2vec.models.checkpoints.known import evaluation_of
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.verification.fingerprint import describe
from vlm2vec.progress import progress_bar
from vlm2vec.retrieval.cache_folder import default_cache
from vlm2vec.retrieval.embedding_cache import EmbeddingCache
from vlm2vec.types import EmbeddingInput

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Encodes the inputs of an evaluation.

    Attributes:
        about: What the vectors depend on (`vlm2vec.models.verification.fingerprint`).
        size: `embedding_dimension` and `num_parameters`.
        num_encoded: Number of inputs encoded so far.
    """

    about: dict[str, str]
    size: dict[str, int]
    num_encoded: int

    @property
    def fill(self) -> FillCache:
        """Encodes what an embedding cache lacks."""
        ...


class LocalEngine:
    """A model in this process.

    Image features are saved before the vectors that are computed from them, so a run that resumes after a kill
    computes the same vectors.

    Args:
        model: As for `Embedder.from_pretrained`.
        options: Other arguments of `Embedder.from_pretrained`.
    """

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.embedder = Embedder.from_pretrained(model, **options)
        self.embedder.backbone.cache_images(cache_folder() / "vision")
        self.about = describe(self.embedder, model)
        num_parameters = sum(parameter.numel() for parameter in self.embedder.parameters())
        self.size = {"embedding_dimension": self.embedder.embedding_dim, "num_parameters": num_parameters}
        self.num_encoded = 0

    def encode(self, inputs: Sequence[EmbeddingInput]) -> np.ndarray:
        """Unit-norm vectors [N, D] in input order."""
        vectors = self.embedder.encode(inputs)
        self.num_encoded += len(inputs)
        cache = self.embedder.backbone.vision_cache
        if cache is not None:
            cache.flush()
        return vectors

    @property
    def fill(self) -> FillCache:
        """Encodes what an embedding cache lacks, part after part."""
        return filling(self)


@dataclass(frozen=True)
class Stages:
    """What computes the scores.

    Attributes:
        engine: Opens the engine that encodes; None: the model in this process.
        rerank: A reranker for the first candidates of each query; None: the embedder alone.
    """

    engine: Callable[[], AbstractContextManager[Engine]] | None = None
    rerank: RerankOptions | None = None


def score_model(
    model: str,
    benchmark_file: str | Path,
    output: Path,
    data: Path | None = None,
    options: dict[str, Any] | None = None,
    cache: Path | None = None,
    names: Sequence[str] = (),
    switches: dict[str, Any] | None = None,
    stages: Stages = Stages(),
) -> tuple[Benchmark, list[TaskResult]]:
    """Scores a model on a benchmark and writes the results.

    Under `torchrun` each rank encodes its share into one embedding cache and scores its share of the tasks; rank 0
    writes the results.

    Args:
        model: As for `Embedder.from_pretrained`.
        benchmark_file: A shipped benchmark's name or the path of a YAML file.
        output: Folder for `results.json` and the reports.
        data: Folder of the evaluation sets; None: the one in the benchmark file.
        options: Settings of the model family.
        cache: Folder of the embedding cache; None: in the user's cache folder.
        names: Tasks; empty: all that have a reader.
        switches: Changes to the benchmark's `quirks`, after those of a known checkpoint.
        stages: What encodes, and what reranks.

    Returns:
        The benchmark, and a result for each task (none on ranks other than 0).

    Raises:
        UserError: for bad input; nothing is written in that case.
    """
    since = time.perf_counter()
    benchmark, folder = load_benchmark(benchmark_file, data)
    benchmark = benchmark.with_switches({**_known_switches(model, options), **(switches or {})}).to_score(names)
    tasks, cache = TaskReader(benchmark, folder), cache or default_cache()
    num_inputs, num_pairs = check_tasks(tasks, stages.rerank.top if stages.rerank else 0)
    with joined_processes() as share:
        if share.rank:
            share.wait()  # rank 0 prepares the caches; two ranks would interfere
        opened = stages.engine() if stages.engine else nullcontext(LocalEngine(model, options or {}))
        second = open_second_stage(stages.rerank, cache) if stages.rerank else None
        if share.rank == 0:
            share.wait()
        with opened as encoder:
            vectors = EmbeddingCache(cache, encoder.about)
            for notice in vectors.notices:
                logger.warning(notice)
            with progress_bar(f"scoring {Path(model).name}", num_inputs + num_pairs) as advance:
                results = evaluate(encoder.fill, benchmark, tasks, advance, vectors, share, second)
    if share.rank == 0:
        reranker = {"reranker": second.about} if second else {}
        facts = {**encoder.size, **benchmark.facts(folder), **encoder.about, **reranker}
        seconds = round(time.perf_counter() - since, 1)
        run = provenance(seconds=seconds, num_encoded=encoder.num_encoded, num_inputs=num_inputs)
        write_evaluation(output, model, benchmark, results, facts, run)
    return benchmark, results


def _known_switches(model: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """The switches with which a known checkpoint's authors evaluate it."""
    switches = evaluation_of(model, (options or {}).get("like"))
    if switches:
        told = ", ".join(f"{name}={value}" for name, value in switches.items())
        logger.warning("%s: evaluated as its authors do, with %s; --switch changes them", model, told)
    return switches
