"""The exception for a user's own mistake, and how values and near misses appear in its message.

The command line prints a `UserError` as one line and exits with 2; `--debug` adds the traceback.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

MAX_VALUE = 60
"""Characters of a value in a message: enough to recognise it; an image's bytes would fill the terminal."""

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
