"""Delimited text: every cell of every column is kept, whatever program wrote the file."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec.data.pair_tables import read_rows
from vlm2vec.errors import UserError
from vlm2vec.jobs.sources import open_source
from vlm2vec.media.delimited import DELIMITERS, delimited_rows, unique_names

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=5)
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=5)
NO_DELIMITER = dict.fromkeys(map(ord, DELIMITERS + '"'), "x")


@given(st.lists(NAMES, min_size=2, max_size=5), st.sampled_from(DELIMITERS), st.data())
def test_rows_are_the_ones_that_were_written_with_any_delimiter(
    names: list[str], delimiter: str, data: st.DataObject
) -> None:
    names = [name.translate(NO_DELIMITER) for name in names]
    rows = data.draw(st.lists(st.lists(CELLS, min_size=len(names), max_size=len(names)), max_size=3))
    file = io.StringIO(newline="")
    file.write(delimiter.join(names) + "\n")
    csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(rows)
    file.seek(0)
    found = list(delimited_rows(iter(file), "a.csv"))
    assert [list(row.values()) for row in found if not isinstance(row, UserError)] == rows
    assert all(list(row) == unique_names(names) for row in found if not isinstance(row, UserError))


@given(st.lists(st.sampled_from(["", "n", " n", "n (2)", "N", "n (3)"]), max_size=8))
def test_names_of_columns_are_unique_and_the_first_keeps_its_own(names: list[str]) -> None:
    found = unique_names(names)
    assert len(found) == len(set(found)) == len(names)
    for name in {name.strip() for name in names}:
        assert name in found


@pytest.mark.parametrize(
    ("content", "row"),
    [
        ("text,n,n\nred,1,2\n", {"text": "red", "n": "1", "n (2)": "2"}),
        ("text;n\nred;1,5\n", {"text": "red", "n": "1,5"}),
        ("sep=;\ntext;n\nred;1\n", {"text": "red", "n": "1"}),
        ("\n \r\ntext,n\nred,1\n\n", {"text": "red", "n": "1"}),
        ("text\tn\nred\t1\n", {"text": "red", "n": "1"}),
        ('Text , "n;m;o"\nred,1\n', {"Text": "red", '"n;m;o"': "1"}),
        ('text,n\n"red\nlight",1\n', {"text": "red\nlight", "n": "1"}),
    ],
)
def test_both_readers_of_csv_see_the_same_row(tmp_path: Path, content: str, row: dict[str, str]) -> None:
    (tmp_path / "a.csv").write_text(content)
    assert [found for _, found in read_rows(tmp_path / "a.csv")] == [row]
    (record,) = open_source(tmp_path / "a.csv")
    assert record.item and record.item.text == next(iter(row.values()))
    assert [value for name, value in record.metadata.items() if not name.startswith("v2v_")] == [*row.values()][1:]


def test_a_row_of_another_length_is_an_error_of_that_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n\nred, deep,1\nblue,2\n")
    bad, good = open_source(tmp_path / "a.csv")
    assert "row 1: expected 2 cells as in the header, found 3; quote cells that contain ','" in str(bad.error)
    assert good.item and good.item.text == "blue"
    with pytest.raises(UserError, match="row 0: expected 2 cells"):
        list(read_rows(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text('text,n\n"red,1\n')
    with pytest.raises(UserError, match="not a readable CSV file"):
        list(open_source(tmp_path / "a.csv"))
