"""The scripts in examples/ open as notebooks, are listed in the documentation, and run on small data."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from samples import draw

from vlm2vec import Embedder

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGE = ROOT / "docs/guides/examples.md"
SMALL: dict[str, Any] = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_notebook_with_text_and_parameters(example: Path) -> None:
    notebook = jupytext.read(example)
    nbformat.validate(notebook)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[:2] == ["markdown", "code"] and kinds.count("markdown") >= 3
    assert notebook.cells[0].source.startswith("# ")
    assert notebook.cells[1].metadata.tags == ["parameters"]


def test_the_page_lists_every_example_with_its_output_and_image() -> None:
    text = PAGE.read_text()
    for example in EXAMPLES:
        section = text.partition(f"`examples/{example.name}`")[2].partition("\n## ")[0]
        assert "```text" in section, example.name
        (image,) = re.findall(r"!\[[^\]]+\]\(\.\./assets/([\w./-]+)\)", section)
        assert (ROOT / "docs/assets" / image).stat().st_size < 100_000


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The built-in model in its smallest size, as a folder."""
    folder = tmp_path_factory.mktemp("small") / "model"
    return str(Embedder.from_pretrained("compact", **SMALL).save_pretrained(folder))


def parameters_of(name: str, model: str) -> dict[str, Any]:
    """Values that make an example small."""
    return {
        "search_photos": {"MODEL": model},
        "ask_pdfs": {"MODEL": model},
        "evaluate_mmeb": {"MODELS": [model]},
        "fine_tune": {
            "SETTINGS": [
                "train.steps=2",
                "train.warmup_steps=1",
                "train.batch_size=8",
                *(f"model.options.{k}={v}" for k, v in SMALL.items()),
            ]
        },
        "embed_on_ray": {"MODEL": model, "WORKERS": 1},
    }[name]


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_ends_with_an_image(example: Path, small_model: str, tmp_path: Path) -> None:
    notebook = jupytext.read(example)
    changes = [f"{name} = {value!r}" for name, value in parameters_of(example.stem, small_model).items()]
    notebook.cells.insert(2, nbformat.v4.new_code_cell("\n".join(changes)))
    for number in range(3):
        draw(tmp_path / f"photos/{number}.jpg", "red", number)
    script = tmp_path / "script.py"
    jupytext.write(notebook, script, fmt="py:percent")
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout and (tmp_path / f"{example.stem}.png").is_file()
