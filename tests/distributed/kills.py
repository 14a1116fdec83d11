"""Kill one worker of a cluster while it works."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def workers(kind: str) -> list[int]:
    """Process ids of the actors of a class: grandchildren of this process, below the raylet."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:  # the process has ended
            continue
    mine = {pid for pid, parent in parents.items() if parent == os.getpid()}
    return [pid for pid, name in names.items() if parents[pid] in mine and kind in name]


@contextmanager
def one_killed(kind: str, folder: Path, done: str) -> Iterator[list[int]]:
    """Kill one worker as soon as the first part is finished, while others are in progress.

    Args:
        kind: Class of the actors.
        folder: Folder of the finished parts.
        done: Glob pattern of finished parts.

    Yields:
        The ids of the killed processes, filled in before the block ends.
    """
    killed: list[int] = []

    def kill_one() -> None:
        while not list(folder.glob(done)):
            time.sleep(0.01)
        killed.append(workers(kind)[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)  # daemon: if the body fails, no part appears
    killer.start()
    yield killed
    killer.join()
