"""The messages quoted on the page Troubleshooting occur in the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/start/troubleshooting.md"
HEADINGS = re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@cache
def texts_of_the_code() -> list[str]:
    """Every text of the package, with an ellipsis where a value is inserted."""
    found = []
    for path in (ROOT / "src/vlm2vec").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_written_by_the_code(heading: str) -> bool:
    """Whether some text has the heading's fixed words in their order."""
    pattern = re.compile(".*".join(map(re.escape, heading.split("…"))), re.DOTALL)
    return any(pattern.search(text) for text in texts_of_the_code())


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_heading_is_a_message_of_the_code(heading: str) -> None:
    assert is_written_by_the_code(heading)


def test_the_page_has_twenty_messages_and_a_message_of_other_words_is_found_out() -> None:
    assert len(HEADINGS) >= 20 and len(set(HEADINGS)) == len(HEADINGS)
    assert not is_written_by_the_code("…: no such recipes at all")
    assert not is_written_by_the_code("lower … step …")
