"""A file or folder is complete or absent, and a failed write leaves the previous content."""

import json
from pathlib import Path

import pytest

from vlm2vec.files import replacing, write_json, write_text


def test_a_failed_write_leaves_the_previous_content_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), replacing(target) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_replaces_a_folder_and_a_failed_one_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("first", "second"):
        with replacing(target) as beside:
            beside.mkdir()
            (beside / content).touch()
    assert [path.name for path in target.iterdir()] == ["second"]
    with pytest.raises(RuntimeError), replacing(target) as beside:
        beside.mkdir()
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_writers_that_choose_a_format_by_suffix_see_the_targets(tmp_path: Path) -> None:
    with replacing(tmp_path / "deep/vectors.npy") as beside:
        assert beside.suffix == ".npy"
        beside.touch()
    assert (tmp_path / "deep/vectors.npy").exists()


def test_json_keeps_letters_and_ends_with_a_line_break(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Käse"})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"name": "Käse"}
    assert "ä" in text
    assert text.endswith("}\n")
