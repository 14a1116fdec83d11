"""What the terminal shows of an exception: one line and an exit code."""

from __future__ import annotations

import traceback

import typer

from vlm2vec.errors import UserError

MISTAKE, FAILURE = 2, 1
"""Exit codes: something the user can correct, and a fault of this program."""
MAX_LINE = 2000


def explain(error: Exception) -> tuple[str, int]:
    """One line for the terminal and the exit code.

    A `UserError` is its own text. A mistake in the arguments names the command whose help to read. An error of the
    operating system (disk full, no permission) names the file. Anything else is a fault of this program: the line has
    the exception, the place in this package that it passed last, and how to see the traceback.
    """
    if isinstance(error, UserError):
        return _one_line(str(error)), MISTAKE
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "vlm2vec"
        return f"{_one_line(error.format_message())} See: {command} --help", error.exit_code
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        return _one_line(f"{place}{error.strerror}"), MISTAKE
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
