"""Composed image retrieval: the query's image is a hard negative of its pair."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from samples import COLORS, draw, write_train_set

from vlm2vec.data.examples import TrainExample
from vlm2vec.media.images import ImageRef
from vlm2vec.training.config import Recipe
from vlm2vec.training.run import read_log, read_sets, train
from vlm2vec.types import EmbeddingInput

ASK, SHOW = "<|image_1|>\nFind the same in another colour\n", "<|image_1|>\nRepresent the given image.\n"


@pytest.fixture
def values(recipe_values: dict[str, Any], train_root: Path) -> dict[str, Any]:
    """A recipe for a set of edited images, some of which have a negative of their own."""
    rows = []
    for i in range(8):
        before, after = (
            f"images/Edit/Train/{color}_{i}.png" for color in (list(COLORS)[i % 4], list(COLORS)[-1 - i % 4])
        )
        for path in (before, after):
            draw(train_root / path, Path(path).name.split("_")[0], i)
        rows.append({"qry": ASK, "qry_image_path": before, "pos_text": SHOW, "pos_image_path": after})
    write_train_set(train_root, "Edit", rows)
    sets = {name: {"reference_negative": True} for name in ("Edit", "Color", "Find")}
    return {**recipe_values, "data": {"root": str(train_root), "sets": sets, "batching": "single"}}


def test_the_negative_is_the_target_with_the_image_of_the_query(values: dict[str, Any]) -> None:
    for example in read_sets(Recipe.model_validate(values))["Edit"]:
        (negative,) = example.negatives
        assert negative == dataclasses.replace(example.target, images=example.query.images)
        assert negative.text == SHOW and negative != example.target


def test_pairs_without_images_on_both_sides_keep_their_negatives(values: dict[str, Any]) -> None:
    sets = read_sets(Recipe.model_validate(values))
    assert all(len(example.negatives) == 1 and not example.negatives[0].images for example in sets["Color"])
    assert all(not example.negatives for example in sets["Find"])


def test_equal_images_give_no_negative_and_scores_stay_aligned() -> None:
    one, other = (ImageRef.of(f"{name}.png") for name in ("a", "b"))
    query, target = EmbeddingInput("edited", (one,)), EmbeddingInput(None, (other,))
    same = TrainExample(query, EmbeddingInput(None, (one,)))
    assert same.with_reference_negative() is same
    scored = TrainExample(query, target, scores=(2.0,)).with_reference_negative()
    assert scored.negatives == (EmbeddingInput(None, (one,)),)
    assert scored.scores[0] == 2.0 and len(scored.scores) == 2 and scored.scores[1] != scored.scores[1]


def test_records_have_reference_negatives_too(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    row = {"query": {"text": "in red", "image": "a.png"}, "target": {"image": "b.png"}, "negatives": ["a text"]}
    (folder / "edits.jsonl").write_text(json.dumps(row))
    data = {"root": str(folder), "sets": {"edits": {"reference_negative": True}}}
    streamed = read_sets(Recipe.model_validate({**recipe_values, "data": data}))["edits"]
    assert [item.text for item in streamed[0].negatives] == ["a text", None]
    assert streamed[0].negatives[1].images == streamed[0].query.images


def test_gradient_caching_gives_the_loss_and_the_gradient_of_a_whole_batch(
    values: dict[str, Any], tmp_path: Path, tiny_qwen2_vl: str
) -> None:
    logs = []
    for chunk in (3, 100):
        changes = {"chunk_size": chunk, "steps": 2, "kept_chunks": 0}
        settings = {**values["train"], **changes}
        recipe = {
            **values,
            "model": {"base": tiny_qwen2_vl, "options": {}},  # the built-in model has dropout of its own
            "train": settings,
            "lora": {"rank": 4, "dropout": 0.0},
            "output": str(tmp_path / f"{chunk}"),
        }
        recipe["data"] = {**values["data"], "sets": {"Edit": {"reference_negative": True}}}
        logs.append(read_log(train(Recipe.model_validate(recipe))))
    for cached, whole in zip(*logs, strict=True):
        assert cached["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert cached["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
