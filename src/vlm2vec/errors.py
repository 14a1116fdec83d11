"""The exception for a user's own mistake, and how values and near misses appear in its message.

The command line prints a `UserError` as one line and exits with 2; `--debug` adds the traceback.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable

MAX_VALUE = 60
"""Characters of a value in a message: enough to recognise it; an image's bytes would fill the terminal."""

ALTERNATIVE = re.compile(
    r"(constrained-)?(int|str|float|bool|list|dict|tuple|none)|(literal|list|dict|tuple|function-\w+)\[.*"
)
"""Name of a union's alternative in pydantic's location of an error."""
EXPECTED = tuple(
    (re.compile(pattern), words)
    for pattern, words in {
        r"Value error, (.*)": r"\1",
        r"Field required": "is missing",
        r"Input should be a valid boolean.*": "expected true or false",
        r"Input should be a valid integer.*": "expected a whole number",
        r"Input should be a valid number.*": "expected a number",
        r"Input should be a valid string.*": "expected a text",
        r"Input should be a valid (dictionary|mapping).*": "expected keys with values",
        r"Input should be a valid (\w+).*": r"expected a \1",
        r"\w+ should have at least (\d+) items?.*": r"expected at least \1 entries",
        r"String should have at least (\d+) char.*": r"expected at least \1 characters",
        r"String should match pattern (.*)": r"expected a text that matches \1",
        r"Input should be greater than or equal to (.*)": r"expected \1 or more",
        r"Input should be less than or equal to (.*)": r"expected \1 or less",
        r"Input should be greater than (.*)": r"expected more than \1",
        r"Input should be (.*)": r"expected \1",
    }.items()
)
"""Beginnings of pydantic's messages, and what they say here."""

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = MAX_VALUE


class UserError(ValueError):
    """Input that the user can correct: the message names the object, the place, what was expected and the fix."""


def shown(value: object) -> str:
    """The `repr` of a value for a message, at most `MAX_VALUE` characters: a longer one ends in an ellipsis.

    A long text or bytes is cut before its `repr` is made, so the cost does not grow with the value.
    """
    head = value[: MAX_VALUE + 1] if isinstance(value, str | bytes | bytearray) else value
    text = repr(head) if isinstance(head, str | bytes | bytearray) else _REPR.repr(head)
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean X?"` for the known word nearest to `word`; "" if no word is near."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""


def field_of(location: Iterable[object]) -> str:
    """The dotted name of a field from pydantic's location, without the names of a union's alternatives at its end."""
    parts = [str(part) for part in location]
    while parts and ALTERNATIVE.fullmatch(parts[-1]):
        parts.pop()
    return ".".join(parts)


def expected_in(message: str) -> str:
    """What pydantic's message of a wrong value expected, in the words of this project."""
    for pattern, words in EXPECTED:
        if found := pattern.match(message):
            return found.expand(words)
    return message
