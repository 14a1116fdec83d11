"""A file or folder is complete or absent, and a failed write leaves the previous content."""

import json
from pathlib import Path

import pytest

from vlm2vec.errors import UserError
from vlm2vec.files import read_yaml, replacing, write_json, write_text


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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tasks: {A: 1, A: 2}", "key 'A' appears twice"),
        ("a: 1\na: 1", "key 'a' appears twice"),
        ("n: " + "9" * 5000, "Exceeds the limit"),
        ("a: " + "[" * 5000, "recursion"),
        ("a: {", "expected"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)
def test_yaml_that_would_lose_a_value_or_cannot_be_parsed_is_one_error(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml: not valid YAML") as caught:
        read_yaml(tmp_path / "a.yaml")
    assert reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_merged_keys_of_yaml_may_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {a: 1, b: 2}\nmine: {<<: *base, b: 3}\n")
    assert read_yaml(tmp_path / "a.yaml")["mine"] == {"a": 1, "b": 3}
