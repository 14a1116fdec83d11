from __future__ import annotations

import pytest
from rich.table import Table

from vlm2vec.progress import say

LONG = "/folder/" + "a" * 200


def test_a_table_in_a_pipe_is_one_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table()
    for heading in ("task", "file"):
        table.add_column(heading)
    table.add_row("Find", LONG)
    table.add_row("Name", "short")
    say(table)
    lines = capsys.readouterr().out.splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert [line.split() for line in lines] == [["task", "file"], ["Find", LONG], ["Name", "short"]]


def test_a_path_is_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"Report: {LONG} " * 3)
    assert len(capsys.readouterr().out.splitlines()) == 1
