"""Data without negatives is reported before the first step, and batches without negatives when they occur."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm2vec import EmbeddingInput, UserError
from vlm2vec.data.examples import TrainExample
from vlm2vec.training.config import Recipe
from vlm2vec.training.data_checks import check_negatives
from vlm2vec.training.run import read_log, train

Sets = dict[str, list[TrainExample]]


def pair(query: str, target: str, *negatives: str, **more: Any) -> TrainExample:
    return TrainExample(EmbeddingInput(query), EmbeddingInput(target), tuple(map(EmbeddingInput, negatives)), **more)


def recipe(values: dict[str, Any], **changes: Any) -> Recipe:
    merged = {name: {**values[name], **change} if name in values else change for name, change in changes.items()}
    return Recipe.model_validate({**values, **merged})


SAME_TARGET = [pair(f"q {i}", "yes") for i in range(4)]
SAME_QUERY = [pair("q", f"t {i}") for i in range(4)]
GOOD = [pair("a", "b"), pair("c", "d")]


@pytest.mark.parametrize(
    ("sets", "changes", "message"),
    [
        ({"S": SAME_TARGET}, {}, "S: no query has a negative, because all targets are equal"),
        ({"S": SAME_QUERY}, {}, "because all queries are equal"),
        ({"S": [pair("a", "b")] * 3}, {}, "because there is only one distinct pair"),
        ({"S": [pair("a", "b", "b")]}, {}, "because there is only one distinct pair"),
        ({"S": [pair("a", "b", target_id="1"), pair("c", "d", target_id="1")]}, {}, "all targets are equal"),
        ({"S": SAME_TARGET, "T": GOOD}, {"data": {"batching": "single"}}, "^S: no query"),
        ({"S": GOOD, "T": SAME_QUERY}, {"data": {"sub_batch_size": 8}}, "^T: no query"),
    ],
)
def test_data_without_a_negative_is_refused(
    recipe_values: dict[str, Any], sets: Sets, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_negatives(recipe(recipe_values, **changes), sets)


@pytest.mark.parametrize(
    ("sets", "changes"),
    [
        ({"S": GOOD}, {}),
        ({"S": [pair("a", "b", "c")]}, {}),
        ({"S": SAME_TARGET, "T": SAME_QUERY}, {"data": {"sub_batch_size": 4}}),
        ({"S": SAME_QUERY}, {"loss": {"mask_equal_queries": False}}),
        ({"S": SAME_TARGET, "T": GOOD}, {"data": {"batching": "mixed"}}),
    ],
)
def test_data_with_a_negative_is_accepted(recipe_values: dict[str, Any], sets: Sets, changes: dict[str, Any]) -> None:
    check_negatives(recipe(recipe_values, **changes), sets)


def of_records(values: dict[str, Any], folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Recipe:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"root": str(folder), "sets": ["rows"], **changes.pop("data", {})}
    return recipe(values, data=data, **changes)


def test_a_streamed_set_of_equal_targets_stops_before_the_first_step(
    recipe_values: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"query": f"q {i}", "target": "yes"} for i in range(8)]
    settings = of_records(recipe_values, tmp_path / "records", rows)
    with pytest.raises(UserError, match="rows: no query has a negative, because all targets are equal: the loss"):
        train(settings)
    assert not settings.output.exists()


def test_a_batch_without_a_negative_is_a_warning_with_its_cause_once(
    recipe_values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"query": f"q {i}", "target": "yes"} for i in range(30)] + [{"query": "other", "target": "no"}]
    settings = of_records(recipe_values, tmp_path / "records", rows, train={"batch_size": 2, "steps": 4})
    log = read_log(train(settings))
    assert any(entry["loss"] == 0 for entry in log)
    found = [record.getMessage() for record in caplog.records if "has a negative" in record.getMessage()]
    assert len(found) == 1 and "all targets are equal" in found[0] and "rows.jsonl, line" in found[0]
