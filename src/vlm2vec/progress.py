"""What a person at the terminal sees: lines on standard output, progress bars with remaining time on the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def say(content: Any) -> None:
    """Prints a text or a rich table as it is: a path or command must not be wrapped, or it cannot be copied."""
    Console().print(content, soft_wrap=isinstance(content, str), markup=False, highlight=False)


def rule(title: str) -> None:
    """Prints a line across the screen with a title."""
    Console().rule(title)


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Shows a bar while the block runs; the yielded function advances it.

    Args:
        description: What is going on.
        total: Steps in all; None where unknown.
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
