"""The commands as a user runs them, some in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from samples import COLORS, draw
from typer.testing import CliRunner

from vlm2vec import __version__
from vlm2vec.cli import app, run

Values = dict[str, object]
Typed = Callable[..., subprocess.CompletedProcess[str]]


def vlm2vec(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlm2vec.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def in_process(*arguments: str | Path) -> str:
    """What a command prints, without the time that a process of its own takes to start."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    """Runs a command in this process, errors included, as the installed program does."""

    def run_here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        code = run(list(map(str, arguments)))
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run_here


@pytest.fixture
def recipe(recipe_values: Values, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values))
    return path


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """One task: name the colour, four candidates."""
    rows = []
    for i, color in enumerate(COLORS):
        draw(tmp_path / f"eval/Color/{color}.png", color, 100 + i)
        names = [color, *(other for other in COLORS if other != color)]
        ask = {"qry_text": "<|image_1|>\nName the colour\n", "qry_img_path": f"Color/{color}.png"}
        rows.append({**ask, "tgt_text": names, "tgt_img_path": [""] * 4})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "eval/Color/test-00000-of-00001.parquet")
    task = {"name": "Color", "meta_task": "classification", "split": "ind", "metric": "hit@1", "num_queries": 4}
    path = tmp_path / "benchmark.yaml"
    path.write_text(yaml.safe_dump({"name": "colors", "tasks": [task], "source": {"eval": "eval"}}))
    return path


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2, one line that says what is wrong, and no traceback."""
    assert done.returncode == 2, done.stderr[-2000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in errors[0]


def test_train_verify_and_eval_go_from_a_recipe_to_results(recipe: Path, benchmark: Path, tmp_path: Path) -> None:
    done = vlm2vec("train", recipe, "train.steps=8", "train.save_steps=8")
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    assert f"Next: vlm2vec eval {run}" in done.stdout.replace("\n", " ")
    done = vlm2vec("verify", run)
    assert done.returncode == 0 and "lowest cosine 1.0000" in done.stdout.replace("\n", " ")
    evaluation = ["eval", run, "--benchmark", benchmark, "--cache", tmp_path / "cache"]
    done = vlm2vec(*evaluation, "--output", tmp_path / "scores")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "scores/results.json").read_text())
    task = results["tasks"]["Color"]
    assert (task["metric"], task["num_queries"], task["num_candidates"]) == ("hit@1", 4, 4)
    assert 0 <= task["score"] <= 1
    assert results["groups"] == dict.fromkeys(("classification", "ind", "overall"), task["score"])
    facts = {"template", "resolution", "libraries", "data_revision", "data_switches", "precision", "weights"}
    assert facts <= set(results["about"])
    assert "- num encoded: 8" in (tmp_path / "scores/results.md").read_text()
    assert "report.html" in in_process("report", tmp_path / "scores", "--output", tmp_path / "report")
    assert "data revision" in (tmp_path / "report/report.html").read_text()
    assert " 8 " in in_process("cache", "ls", "--cache", tmp_path / "cache")
    assert "freed" in in_process("store", "clean", "--all", "--store", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_training_on_a_missing_image_names_file_and_row(recipe: Path, train_root: Path, tmp_path: Path) -> None:
    (train_root / "images/Color/Train/blue_6.png").unlink()
    assert_one_line(vlm2vec("train", recipe), "row 6", "field qry_image_path", "blue_6.png")
    assert not (tmp_path / "run").exists()


def test_evaluation_on_a_missing_image_writes_nothing(benchmark: Path, tmp_path: Path, typed: Typed) -> None:
    (tmp_path / "eval/Color/red.png").unlink()
    small = ["--option", "num_layers=1", "--option", "visual_tokens=4", "--option", "image_size=64"]
    done = typed("eval", "compact", "--benchmark", benchmark, "--output", tmp_path / "scores", *small)
    assert_one_line(done, "row 0", "red.png")
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "absent.yaml"], ["absent.yaml", "no such recipe"]),
        (["train", "{recipe}", "train.steqs=3"], ["unknown key train.steqs"]),
        (["train", "{recipe}", "data.root=absent"], ["absent", "no such data folder"]),
        (["train", "{recipe}", "train.warmup_steps=99"], ["warmup_steps 99 must be below steps 6"]),
        (["train", "{recipe}", "model.base={folder}"], ["not a checkpoint"]),
        (["eval", "{folder}", "--benchmark", "{benchmark}", "-o", "x"], ["not a checkpoint", "config.json"]),
        (["eval", "compact", "--benchmark", "absent.yaml", "-o", "x"], ["absent.yaml", "no such benchmark file"]),
        (
            ["eval", "compact", "--benchmark", "{benchmark}", "-o", "x", "--option", "layers=1"],
            ["unknown settings layers"],
        ),
        (["verify", "{folder}"], ["not a checkpoint"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    arguments: list[str], parts: list[str], recipe: Path, benchmark: Path, tmp_path: Path, typed: Typed
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"recipe": recipe, "benchmark": benchmark, "folder": tmp_path / "empty"}
    done = typed(*[argument.format(**places) for argument in arguments])
    assert_one_line(done, *parts)
    assert not Path("x").exists()


def test_version_and_help_answer_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["-h"], [], ["train", "-h"]):
        assert run(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"vlm2vec {__version__}\n")
    assert printed.count("Usage: vlm2vec [OPTIONS] COMMAND") == 2
    module = subprocess.run([sys.executable, "-m", "vlm2vec", "--version"], capture_output=True, text=True, check=True)
    assert module.stdout == f"vlm2vec {__version__}\n"


def test_debug_shows_the_traceback_behind_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "absent.yaml"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run(["train", "absent.yaml", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "find_recipe" in shown and shown.splitlines()[-1].startswith("error: absent.yaml: no such recipe")


def test_shipped_recipes_are_listed_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in Path("recipes").glob("*.yaml"))
    assert all(len(line.split()) > 3 for line in lines)
