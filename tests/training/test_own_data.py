"""`vlm2vec train DATA`: from a table to a scored model, and recipes to start from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from samples import COLORS, draw

from vlm2vec import Embedder, UserError
from vlm2vec.cli import run
from vlm2vec.models.checkpoints.folder import add_adapter
from vlm2vec.training.base_adapter import adapter_settings
from vlm2vec.training.config import LoraSettings, Recipe, load_recipe
from vlm2vec.training.init_recipe import write_commented_recipe
from vlm2vec.training.output import check_new

SMALL = [
    "model.options={num_layers: 1, visual_tokens: 4, image_size: 64}",
    "train.bf16=false",
    "train.steps=2",
    "train.warmup_steps=0",
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    lines = []
    for i in range(24):
        color = list(COLORS)[i % 4]
        draw(tmp_path / f"images/{i}.png", color, i)
        lines.append(json.dumps({"text": f"{color} {i}", "image": f"images/{i}.png"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path / "pairs.jsonl"


def test_pairs_become_a_run_that_is_scored_before_and_after(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs/mine"
    assert run(["train", str(pairs), "--base", "compact", "-o", str(output), *SMALL]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "24 pairs; query: text; target: image" in printed
    assert printed.count(" -> ") == 3 and "'red 0' -> 0.png" in printed
    assert "Held out: 2 of 24 pairs, scored before and after; training: 22" in printed
    history = json.loads((output / "evaluations.json").read_text())
    assert [entry["step"] for entry in history] == [0, 2]
    assert Embedder.from_pretrained(output).encode(["red"]).shape[0] == 1
    recipe = load_recipe(tmp_path / "runs/mine.data/recipe.yaml")
    assert recipe.evaluate is not None and recipe.train.learning_rate == 5e-4
    # A finished run is not overwritten, and neither is its data.
    assert run(["train", str(pairs), "-o", str(output)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_large_model_is_built_in_small_from_the_same_command(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(pairs), "--base", "Qwen/Qwen2-VL-2B-Instruct", "-o", str(tmp_path / "run"), "--dry-run"]
    assert run([*command, "train.bf16=false"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "Dry run: losses" in printed
    assert f"Next: vlm2vec train {tmp_path}/run.data/recipe.yaml" in printed
    recipe = load_recipe(tmp_path / "run.data/recipe.yaml")
    assert (recipe.model.family, recipe.train.learning_rate, recipe.train.temperature) == ("qwen2_vl", 5e-5, 0.02)
    assert not (tmp_path / "run").exists()


def test_a_base_with_an_adapter_brings_its_lora_settings(tmp_path: Path) -> None:
    embedder = Embedder.from_pretrained("compact", num_layers=1, visual_tokens=4, image_size=64)
    add_adapter(embedder.backbone, 3, 7, 0.0, None)
    folder = embedder.save_pretrained(tmp_path / "base")
    found = adapter_settings(str(folder))
    assert found == {"rank": 3, "alpha": 7, "dropout": 0.0, "dora": False}
    assert adapter_settings("compact") is None
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {{base: {folder}}}\ndata: {{root: train}}\ntrain: {{steps: 10}}\noutput: runs/x\n")
    assert load_recipe(file).lora == LoraSettings(**found)
    assert load_recipe(file, ["lora.rank=2"]).lora == LoraSettings(rank=2)


def test_a_failed_start_does_not_block_the_next_and_a_run_is_kept(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/recipe.yaml").write_text("")
    (tmp_path / "run/evaluations.json").write_text("[]")
    check_new(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for kept in ("run/checkpoints/checkpoint-2/trainer_state.json", "other/notes.txt"):
        (tmp_path / kept).parent.mkdir(parents=True)
        (tmp_path / kept).write_text("{}")
        with pytest.raises(UserError, match="already holds a run"):
            check_new(tmp_path / kept.partition("/")[0])
        assert (tmp_path / kept).exists()


def test_a_commented_recipe_has_every_key_at_its_default(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    write_commented_recipe(file)
    required = {"data": {"root": "data/train"}, "train": {"steps": 1000}, "output": "runs/mine"}
    assert load_recipe(file) == Recipe.model_validate(required)
    text = file.read_text()
    named = [
        f" {key}:"
        for section in Recipe.model_fields
        for key in getattr(Recipe.model_fields[section].annotation, "model_fields", {})
    ]
    assert [key for key in named if key not in text] == []
    assert text.count("#") > len(named)
