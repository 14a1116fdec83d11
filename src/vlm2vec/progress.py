"""Output for the terminal: results on standard output, progress bars on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

MAX_PIPE_WIDTH = 10_000  # a table is as wide as its content; this only keeps rich from wrapping


def say(content: Any) -> None:
    """Prints a text or a rich table to standard output.

    A text is never wrapped, so that a path or a command can be copied. In a pipe or a file, a table has no frame and
    one line for each row, with its cells aligned by spaces and none at the end of a line.
    """
    console = Console()
    if isinstance(content, Table) and not console.is_terminal:
        content.box, content.pad_edge = None, False
        wide = Console(width=MAX_PIPE_WIDTH)
        with wide.capture() as printed:
            wide.print(content, markup=False, highlight=False)
        content = "\n".join(line.rstrip() for line in printed.get().rstrip("\n").split("\n"))
    console.print(content, soft_wrap=isinstance(content, str), markup=False, highlight=False)


def rule(title: str) -> None:
    """Prints a line across the screen with a title."""
    Console().rule(title)


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Shows a bar while the block runs; the yielded function advances it.

    Args:
        description: Label of the bar.
        total: Number of steps; None if unknown.
    """
    with _bars() as bars:
        task = bars.add_task(description, total=total)
        yield lambda done: bars.advance(task, done)


@contextmanager
def stage_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar for each stage of the block; the yielded function takes (stage, done, total)."""
    with _bars() as bars:
        tasks: dict[str, int] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield update


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
