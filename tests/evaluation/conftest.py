"""A read-only toy benchmark shared by all evaluation tests."""

from pathlib import Path

import pytest
from evaluation.toys import write_toy_benchmark

from vlm2vec.evaluation.benchmark import Benchmark, load_benchmark
from vlm2vec.evaluation.evaluate import read_tasks
from vlm2vec.types import EvalQuery


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_benchmark(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="session")
def toy(toy_file: Path) -> tuple[Benchmark, dict[str, list[EvalQuery]]]:
    benchmark, folder = load_benchmark(toy_file)
    return benchmark, read_tasks(benchmark, folder)
