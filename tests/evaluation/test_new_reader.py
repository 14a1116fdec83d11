"""The example in docs/explain/architecture.md: a benchmark in a new layout needs one reader and one line of a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import EvalTask, load_benchmark
from vlm2vec.evaluation.evaluate import evaluate, read_tasks
from vlm2vec.evaluation.tasks import READERS
from vlm2vec.types import EmbeddingInput, EvalQuery

BENCHMARK = """
name: colours
tasks:
- {name: Words, reader: csv, meta_task: retrieval, metric: hit@1, scope: local}
"""


class LetterEncoder:
    """Counts letters, so that equal words have equal vectors."""

    def encode(self, inputs: Sequence[EmbeddingInput], **options: Any) -> np.ndarray:
        counts = np.array(
            [[(item.text or "").count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for item in inputs]
        )
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


def read_csv(task: EvalTask, folder: Path, quirks: object) -> list[EvalQuery]:
    with (folder / f"{task.name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        EvalQuery(EmbeddingInput(row["query"]), (EmbeddingInput(row["wrong"]), EmbeddingInput(row["right"])), (1,))
        for row in rows
    ]


def test_a_reader_and_a_line_of_the_table_score_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Words.csv").write_text("query,right,wrong\nred,red,blue\nblue,blue,green\n")
    (tmp_path / "colours.yaml").write_text(BENCHMARK)
    monkeypatch.setitem(READERS, "csv", read_csv)
    benchmark, folder = load_benchmark(tmp_path / "colours.yaml", tmp_path)
    results = evaluate(LetterEncoder(), benchmark, read_tasks(benchmark, folder))
    assert [(result.task.name, result.score) for result in results] == [("Words", 1.0)]


def test_an_unknown_reader_is_named_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "colours.yaml").write_text(BENCHMARK)
    with pytest.raises(UserError, match="unknown reader 'csv'; expected one of mmeb, video"):
        read_tasks(*load_benchmark(tmp_path / "colours.yaml", tmp_path))
