"""Evaluation during training: its output, and that training is unaffected."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from samples import COLORS, draw

from vlm2vec import Embedder, UserError
from vlm2vec.monitor import Monitor
from vlm2vec.training.config import Recipe
from vlm2vec.training.output import read_history
from vlm2vec.training.run import train


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """Name the colour, twelve queries, four candidates."""
    rows = []
    for i in range(12):
        color = list(COLORS)[i % 4]
        draw(tmp_path / f"eval/Color/{i}.png", color, 100 + i)
        names = [color, *(other for other in COLORS if other != color)]
        ask = {"qry_text": "<|image_1|>\nName the colour\n", "qry_img_path": f"Color/{i}.png"}
        rows.append({**ask, "tgt_text": names, "tgt_img_path": [""] * 4})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "eval/Color/test-00000-of-00001.parquet")
    task = {"name": "Color", "meta_task": "classification", "split": "ind", "metric": "hit@1"}
    path = tmp_path / "benchmark.yaml"
    path.write_text(yaml.safe_dump({"name": "colors", "tasks": [task], "source": {"eval": "eval"}}))
    return path


def recipe(values: dict[str, object], output: Path, **evaluate: object) -> Recipe:
    return Recipe.model_validate({**values, "output": str(output), "evaluate": evaluate or None})


def test_a_run_is_scored_on_the_way_and_its_best_checkpoint_kept(
    recipe_values: dict[str, object], benchmark: Path, tmp_path: Path
) -> None:
    settings = {"benchmark": str(benchmark), "num_queries": 8, "every_steps": 4, "best_by": "ind"}
    watched = recipe(recipe_values, tmp_path / "watched", **settings)
    folder = train(watched, monitor=Monitor(watched))
    history = read_history(folder)
    assert [entry["step"] for entry in history] == [4, 6]  # every four, and after the last
    assert all(set(entry["tasks"]) == {"Color"} for entry in history)
    best = max(history, key=lambda entry: (entry["groups"]["ind"], -entry["step"]))
    kept = json.loads((folder / "best/evaluation.json").read_text())
    assert kept["model"] == f"step {best['step']}" and kept["tasks"]["Color"]["num_queries"] == 8
    assert Embedder.from_pretrained(folder / "best").encode(["a"]).shape[0] == 1
    assert not (folder / "checkpoints/vectors").exists()
    plain = train(recipe(recipe_values, tmp_path / "plain"))
    one, other = (load_file(run / "adapter_model.safetensors") for run in (folder, plain))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_what_cannot_be_evaluated_is_said_before_the_training(
    recipe_values: dict[str, object], benchmark: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no such task in colors"):
        Monitor(recipe(recipe_values, tmp_path / "a", benchmark=str(benchmark), tasks=["Colour"]))
    with pytest.raises(UserError, match="vqa is not a group of these tasks; groups: classification, ind, overall"):
        Monitor(recipe(recipe_values, tmp_path / "a", benchmark=str(benchmark), best_by="vqa"))
    (tmp_path / "eval/Color/3.png").unlink()
    with pytest.raises(UserError, match=r"row 3.*3\.png: the image is missing"):
        Monitor(recipe(recipe_values, tmp_path / "a", benchmark=str(benchmark)))
