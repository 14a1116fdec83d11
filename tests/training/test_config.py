from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from vlm2vec import UserError
from vlm2vec.training.config import Recipe, dump_recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


MINIMAL = "data: {root: train}\ntrain: {steps: 10}\noutput: runs/x\n"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    load_recipe(path)


def test_dotted_overrides_change_single_values(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["train.steps=3", "lora.rank=2", "data.sets=[A, B]"])
    assert (recipe.train.steps, recipe.lora.rank, recipe.data.sets) == (3, 2, ["A", "B"])
    assert load_recipe(write(tmp_path, MINIMAL), ["lora=null"]).lora is None


def test_every_setting_is_explained_by_what_it_costs_and_buys() -> None:
    page = re.sub(r"```.*?```", "", (RECIPES.parent / "docs/guides/training.md").read_text(), flags=re.DOTALL)
    named = set(re.findall(r"[a-z0-9_]+", " ".join(re.findall(r"`[^`]+`", page))))
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    unexplained = []
    for name, annotation in sections.items():
        kinds = [kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")]
        unexplained += [f"{name}.{key}" for kind in kinds for key in kind.model_fields if key not in named]
    assert sorted(unexplained) == []


def test_a_saved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["train.temperature=0.05"])
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (MINIMAL, ["train.stepz=3"], r"unknown key train\.stepz; did you mean train\.steps\?"),
        (MINIMAL + "modle: {}\n", [], r"unknown key modle; did you mean model\?"),
        (MINIMAL, ["train.temperature=0"], "train.temperature: expected more than 0"),
        (MINIMAL, ["train.learning_rate=.inf"], "train.learning_rate: .*finite number"),
        (MINIMAL, ["train.warmup_steps=10"], "warmup_steps 10 must be below steps 10"),
        (MINIMAL, ["train.steps"], "expected key=value"),
        (MINIMAL, ["=1"], "override '=1': expected key=value"),
        (MINIMAL, ["train.chunk_tokens=0"], r"train\.chunk_tokens: expected more than 0 \(found 0\)"),
        (MINIMAL, ["train.bf16=maybe"], r"train\.bf16: expected true or false \(found 'maybe'\)"),
        (MINIMAL, ["lora.rank=8.5"], r"lora\.rank: expected a whole number \(found 8\.5\)"),
        (MINIMAL, ["loss.kind=foo"], "loss: 'foo' is not a loss; expected one of"),
        (MINIMAL, ["model.base=compact-dual", "model.pooling=mean"], "no effect on compact-dual"),
        ("data: [", [], "not a valid recipe"),
        ("", [], "data: is missing"),
    ],
)
def test_a_bad_recipe_is_one_line_that_names_file_and_key(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)


def test_an_earlier_name_of_a_key_still_works_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL + "model: {towers: vision}\n"))
    assert recipe.model.components == "vision"
    assert "model.towers is deprecated; use model.components" in caplog.text
    assert "towers" not in dump_recipe(recipe)


def test_a_missing_recipe_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize("text", ["5", "a: " + "[" * 5000, "n: " + "9" * 5000, "output: a\noutput: b", "caf\xe9: 1"])
def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"r\.yaml: not (a valid recipe|valid UTF-8)") as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
