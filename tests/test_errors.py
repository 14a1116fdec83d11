from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from vlm2vec.cli.failures import explain
from vlm2vec.errors import MAX_VALUE, UserError, did_you_mean, expected_in, field_of, shown

VALUES = st.recursive(
    st.one_of(st.text(), st.binary(), st.integers(), st.floats(), st.none()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
)


@given(VALUES)
def test_a_value_in_a_message_is_at_most_60_characters_and_whole_where_it_fits(value: object) -> None:
    assert len(shown(value)) <= MAX_VALUE
    if isinstance(value, str | bytes) and len(repr(value)) <= MAX_VALUE:
        assert shown(value) == repr(value)


def test_the_bytes_of_an_image_are_cut_wherever_they_are() -> None:
    pixels = bytes(1 << 20)
    for value in (pixels, [pixels], {"bytes": pixels, "path": "x.jpg"}, [[{"bytes": pixels}]] * 20):
        assert len(shown(value)) <= MAX_VALUE


def test_the_nearest_known_word_is_suggested_in_any_case() -> None:
    assert did_you_mean("Phots", ["photos", "demo"]) == "; did you mean photos?"
    assert did_you_mean("zebra", ["photos", "demo"]) == ""


def test_a_fault_of_another_library_is_one_line_with_the_place_and_exit_code_one() -> None:
    try:
        int("1\n2")
    except ValueError as error:
        line, code = explain(error)
    assert code == 1 and "\n" not in line
    assert "ValueError" in line and "--debug" in line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a: wrong;\n expected b"), "a: wrong; expected b"),
        (
            OSError(28, "No space left on device", "out.parquet"),
            "out.parquet: No space left on device; free some space and run the same command again",
        ),
        (OSError(30, "wrapped: [errno 30]", "x"), "x: Read-only file system; choose a folder that can be written to"),
        (FileNotFoundError(2, "No such file or directory", "x"), "x: No such file or directory"),
    ],
)
def test_what_the_user_can_correct_is_its_own_line_and_exit_code_two(error: Exception, line: str) -> None:
    assert explain(error) == (line, 2)


def test_every_value_in_a_message_passes_through_the_one_place_that_cuts_it() -> None:
    uncut = []
    for path in sorted((Path(__file__).parents[1] / "src").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "UserError":
                parts = (part for part in ast.walk(call) if isinstance(part, ast.FormattedValue))
                uncut += [f"{path}:{part.lineno}" for part in parts if part.conversion == ord("r")]
    assert uncut == []


class Section(BaseModel):
    """Fields of the types that settings have."""

    whole: Annotated[int, Field(ge=1)] = 1
    number: Annotated[float, Field(lt=1)] = 0.5
    switch: bool = True
    word: Literal["a", "b"] = "a"
    either: Literal["auto"] | Annotated[int, Field(gt=0)] = 1
    names: list[str] = []
    some: Annotated[list[int], Field(min_length=1)] = [1]
    code: Annotated[str, Field(pattern="^a")] = "a"
    table: dict[str, int] = {}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"whole": 0}, "whole: expected 1 or more"),
        ({"whole": "x"}, "whole: expected a whole number"),
        ({"number": 2}, "number: expected less than 1"),
        ({"number": "x"}, "number: expected a number"),
        ({"switch": "x"}, "switch: expected true or false"),
        ({"word": "c"}, "word: expected 'a' or 'b'"),
        ({"either": -1}, "either: expected 'auto'"),
        ({"names": "x"}, "names: expected a list"),
        ({"names": [1]}, "names.0: expected a text"),
        ({"some": []}, "some: expected at least 1 entries"),
        ({"code": "x"}, "code: expected a text that matches '^a'"),
        ({"table": []}, "table: expected keys with values"),
    ],
)
def test_errors_of_settings_are_in_the_words_of_this_project(values: dict[str, object], line: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Section.model_validate(values)
    first = caught.value.errors()[0]
    assert f"{field_of(first['loc'])}: {expected_in(first['msg'])}" == line
