"""What the terminal shows of an exception: one line and an exit code."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from vlm2vec.errors import UserError

MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130
"""Exit codes: something the user can correct, a fault of this program, and Ctrl-C."""
MAX_LINE = 2000
FULL = "free some space and run the same command again"
UNWRITABLE = "choose a folder that can be written to"
ADVICE = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "the limit on file sizes (ulimit -f) is too low",
    errno.EROFS: UNWRITABLE,
    errno.EACCES: "check its permissions, or choose another path",
}


class Interrupted(Exception):
    """Ctrl-C in a job that the same command resumes; the message says what is kept."""


@contextmanager
def resumable(kept: Callable[[], str]) -> Iterator[None]:
    """Turns Ctrl-C in the block into `Interrupted`.

    Args:
        kept: Describes the finished work; called after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(kept()) from None


def explain(error: Exception) -> tuple[str, int]:
    """One line for the terminal and the exit code.

    A `UserError` is its own text. A mistake in the arguments names the command whose help to read. An error of the
    operating system (disk full, no permission) names the file. Ctrl-C says what is kept. Anything else is a fault of
    this program: the line has the exception, the place in this package that it passed last, and how to see the
    traceback.
    """
    if isinstance(error, UserError):
        return _one_line(str(error)), MISTAKE
    if isinstance(error, Interrupted | typer.Abort):
        return f"interrupted; {_one_line(str(error))}".rstrip("; "), INTERRUPTED
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "vlm2vec"
        return f"{_one_line(error.format_message())} See: {command} --help", error.exit_code
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        reason = os.strerror(error.errno) if error.errno in ADVICE else error.strerror
        advice = f"; {ADVICE[error.errno]}" if error.errno in ADVICE else ""
        return _one_line(f"{place}{reason}{advice}"), MISTAKE
    text = f"{type(error).__name__}: {_one_line(str(error))[:300]}"
    return f"unexpected {text} ({_place(error)}); --debug shows the traceback; please report it", FAILURE


def _one_line(text: str) -> str:
    """A text without line breaks, cut where it would fill the terminal."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 1]}…"


def _place(error: Exception) -> str:
    """File and line of the last frame inside this package."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "vlm2vec" in frame.filename]
    if not frames:
        return "outside vlm2vec"
    return f"vlm2vec{frames[-1].filename.rpartition('vlm2vec')[2]}, line {frames[-1].lineno}"
