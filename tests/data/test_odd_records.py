"""Records with odd values: an error that names file, row and field, and nothing that is read as something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm2vec import UserError
from vlm2vec.data.records import read_eval_records, read_train_records

EVAL: dict[str, Any] = {"query": "a", "candidates": ["b", "c"]}
TRAIN: dict[str, Any] = {"query": "a", "target": "b"}
POSITIONS = "line 1: field relevant: expected a list of different positions, 0 to 1, found"


def written(path: Path, row: dict[str, Any]) -> Path:
    path.write_text(json.dumps(row))
    return path


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"relevant": []}, f"{POSITIONS} []"),
        ({"relevant": 1}, f"{POSITIONS} 1"),
        ({"relevant": [True]}, f"{POSITIONS} [True]"),
        ({"relevant": [0, 0]}, f"{POSITIONS} [0, 0]"),
        ({"relevant": [2]}, f"{POSITIONS} [2]"),
        ({"gains": ["x"]}, "line 1: field gains: expected 1 numbers of 0 or more"),
        ({"gains": [-1]}, "line 1: field gains: expected 1 numbers of 0 or more"),
        ({"gains": [float("nan")]}, "line 1: field gains: expected 1 numbers of 0 or more"),
        ({"query": ""}, "line 1, field query: empty"),
        ({"query": {"text": 5}}, "line 1, field query: text: expected a text, found 5"),
        ({"query": {"text": "a", "instruction": 5}}, "line 1, field query: instruction: expected a text, found 5"),
        ({"candidates": ["b", "c\ud83d"]}, "line 1, field candidates[1]: character 2 is a lone surrogate"),
    ],
)
def test_an_odd_query_is_an_error_of_its_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        read_eval_records(written(tmp_path / "a.jsonl", EVAL | row))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"negatives": "cat"}, "line 1: field negatives: expected a list, found 'cat'"),
        ({"negatives": [""]}, "line 1, field negatives[0]: empty"),
        ({"target_instruction": ["x"]}, "line 1: field target_instruction: expected a text, found ['x']"),
        ({"target_scores": [float("inf")]}, "line 1: field target_scores: expected a list of 1 numbers"),
        ({"target_scores": [float("nan")]}, "line 1: field target_scores: expected a list of 1 numbers"),
        ({"target": "b\ud83d"}, "line 1, field target: character 2 is a lone surrogate"),
    ],
)
def test_an_odd_pair_is_an_error_of_its_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        read_train_records(written(tmp_path / "a.jsonl", TRAIN | row))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_without_positions_the_first_candidate_is_relevant(tmp_path: Path) -> None:
    [query] = read_eval_records(written(tmp_path / "a.jsonl", EVAL))
    assert (query.relevant, query.gains) == ((0,), ())
    [query] = read_eval_records(written(tmp_path / "b.jsonl", {**EVAL, "relevant": [1, 0], "gains": [2, 1]}))
    assert (query.relevant, query.gains) == ((1, 0), (2.0, 1.0))
