"""Positives, scores, target instructions, guides and teachers from the data to the trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm2vec import EmbeddingInput, UserError
from vlm2vec.batch import Batch
from vlm2vec.data.collate import collate_pairs
from vlm2vec.data.records import read_train_records
from vlm2vec.training import reference
from vlm2vec.training.config import Recipe
from vlm2vec.training.loss_settings import LossSettings
from vlm2vec.training.run import read_log, read_sets, train

ROWS = [
    {"query": "a", "targets": ["a 1", "a 2", "a 3"], "negatives": ["b"], "target_scores": [3, 2.5, None]}
    | {"negative_scores": [-1]},
    {"query": "b", "target": "b 1", "target_instruction": "Represent it."},
    {"query": "c", "target": {"text": "c 1", "instruction": "Own."}, "target_instruction": "Represent it."},
    {"query": "d", "target": "d 1", "negatives": ["c 2", "b 2"], "target_scores": [1], "negative_scores": [0.5, 0]},
]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def nothing(inputs: Any) -> Batch:
    return Batch({})


def test_records_of_several_targets_and_scores_become_a_batch(tmp_path: Path) -> None:
    pairs = collate_pairs(nothing, read_train_records(write(tmp_path / "data", ROWS)), keep_items=True)
    assert [item.text for item in pairs.items][:4] == ["a", "b", "c", "d"]
    assert [pairs.items[row].text for row in pairs.target_rows] == [
        *["a 1", "b 1", "c 1", "d 1"],
        *["a 2", "a 3"],
        *["b", "c 2", "b 2"],
    ]
    assert pairs.target_queries.tolist() == [0, 1, 2, 3, 0, 0, 0, 3, 3]
    assert pairs.is_positive.tolist() == [True] * 6 + [False] * 3
    nan = torch.nan
    expected = torch.tensor([3, nan, nan, 1, 2.5, nan, -1, 0.5, 0])
    torch.testing.assert_close(pairs.scores, expected, equal_nan=True)


def test_an_instruction_of_the_row_is_for_targets_without_one_of_their_own(tmp_path: Path) -> None:
    examples = read_train_records(write(tmp_path / "data", ROWS))
    assert [example.target.instruction for example in examples] == [None, "Represent it.", "Own.", None]
    assert all(example.query.instruction is None for example in examples)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "a", "targets": []}, "line 1: field targets: expected a non-empty list"),
        ({"query": "a", "target": "b", "targets": ["c"]}, "and no field target in the same record"),
        ({"query": "a", "target": "b", "target_scores": [1, 2]}, "field target_scores: expected a list of 1 numbers"),
        ({"query": "a", "target": "b", "target_scores": ["x"]}, "field target_scores: expected a list of 1 numbers"),
        ({"query": "a", "target": "b", "negatives": ["c"], "negative_scores": 3}, "field negative_scores: expected"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_train_records(write(tmp_path / "data", [row]))


def test_a_sets_target_instruction_reaches_targets_and_negatives_in_both_layouts(
    recipe_values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"target_instruction": "Represent the answer."}
    mmeb = {**recipe_values, "data": {**recipe_values["data"], "sets": {"Color": given, "Find": given}}}
    sets = read_sets(Recipe.model_validate(mmeb))
    example = sets["Color"][0]
    for item in (example.target, *example.negatives):
        assert item.instruction == "Represent the answer."
    assert example.query.instruction is None and example.negatives
    assert sets["Find"][0].target.instruction is None  # a verbatim prompt
    assert "Find: target_instruction does not apply to 16 of 16 targets" in caplog.text
    write(tmp_path / "records", ROWS)
    data = {"root": str(tmp_path / "records"), "sets": {"rows": given}, "use_negatives": False}
    streamed = read_sets(Recipe.model_validate({**recipe_values, "data": data}))["rows"]
    own = given["target_instruction"]
    assert [e.target.instruction for e in streamed] == [own, "Represent it.", "Own.", own]
    assert all(not e.negatives and len(e.scores) in (0, len(e.targets)) for e in streamed)


ROWS_TO_TRAIN = [
    {"query": f"q {i}", "targets": [f"t {i}", f"u {i}"], "negatives": [f"t {i + 1} {i}"]}
    | {"target_scores": [2, 1.5], "negative_scores": [i % 3]}
    for i in range(12)
]


def settings(values: dict[str, Any], folder: Path, loss: dict[str, Any]) -> Recipe:
    write(folder / "records", ROWS_TO_TRAIN)
    data = {"root": str(folder / "records"), "batching": "mixed"}
    return Recipe.model_validate({**values, "data": data, "loss": loss, "train": {**values["train"], "steps": 4}})


@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "supcon", "also": {"soft_labels": 0.5}, "hardness_alpha": 9},
        {"kind": "mil_nce", "directions": "both"},
    ],
    ids=lambda loss: loss["kind"],
)
def test_a_recipe_with_labels_trains(recipe_values: dict[str, Any], tmp_path: Path, loss: dict[str, Any]) -> None:
    log = read_log(train(settings(recipe_values, tmp_path, loss)))
    assert len(log) == 4 and all(entry["loss"] > 0 and entry["grad_norm"] > 0 for entry in log)


def test_a_guide_and_a_teacher_encode_each_distinct_input_once_and_a_second_run_encodes_nothing(
    recipe_values: dict[str, Any], tmp_path: Path, tiny_qwen2_vl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "default_cache", lambda: tmp_path / "cache")
    encoded: list[str | None] = []
    fill = reference.fill

    def counting(cache: Any, items: Any, encode: Any, **more: Any) -> int:
        def remember(inputs: list[EmbeddingInput]) -> Any:
            encoded.extend(item.text for item in inputs)
            return encode(inputs)

        return fill(cache, items, remember, **more)

    monkeypatch.setattr(reference, "fill", counting)
    loss = {"guide": tiny_qwen2_vl, "teacher": tiny_qwen2_vl, "also": {"distillation": 1.0}}
    first = settings(recipe_values, tmp_path, loss)
    log = read_log(train(first))
    assert all(entry["loss"] > 0 for entry in log)
    assert 0 < len(encoded) == len(set(encoded)) <= 4 * 12
    encoded.clear()
    again = first.model_copy(update={"output": first.output.with_name("again")})
    assert read_log(train(again))[0]["loss"] == log[0]["loss"]
    assert encoded == []


def test_soft_labels_without_scores_are_refused(recipe_values: dict[str, Any]) -> None:
    recipe = Recipe.model_validate({**recipe_values, "loss": {"also": {"soft_labels": 1.0}}})
    with pytest.raises(UserError, match="Color, Find: loss soft_labels requires scores, but no record has any"):
        train(recipe)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"also": {"distillation": 1.0}}, "need each other"),
        ({"teacher": "x"}, "need each other"),
        ({"kind": "sigmoid", "hardness_alpha": 9}, "hardness_alpha has no effect on the sigmoid loss"),
        ({"also": {"info_nce": 1.0}}, "info_nce is already the kind"),
        ({"also": {"soft": 1.0}}, "'soft' is not a loss; expected one of info_nce"),
    ],
)
def test_contradictory_losses_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings.model_validate(values)
