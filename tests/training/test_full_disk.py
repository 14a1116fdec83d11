"""Training on a full disk, or into a place where nothing can be written: one line, and the next run works."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jobs.test_interruptions import small_disk

from vlm2vec.cli import run

Values = dict[str, object]


@pytest.fixture
def words(recipe_values: Values, tmp_path: Path) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values))
    return ["train", str(path), "train.steps=2", "train.warmup_steps=0", "train.save_steps=1"]


def test_a_full_disk_is_one_line_and_the_next_run_trains(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk():
        assert run(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "run") in line and line.endswith("the limit on file sizes (ulimit -f) is too low")
    assert run([*words, "--resume"]) == 0
    assert (tmp_path / "run/embedder.json").is_file()


def test_an_output_below_a_file_is_one_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run([*words, f"output={tmp_path}/file/run"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path}/file" in line and "Not a directory" in line
