"""Kills one worker of a cluster while it works."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def workers(kind: str) -> list[int]:
    """Processes of this cluster's actors of a class: children of a child (the raylet) of this process."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:  # it has ended meanwhile
            continue
    mine = {pid for pid, parent in parents.items() if parent == os.getpid()}
    return [pid for pid, name in names.items() if parents[pid] in mine and kind in name]


@contextmanager
def one_killed(kind: str, folder: Path, done: str) -> Iterator[list[int]]:
    """While the body runs: as soon as a part is done, that is, while another is in work, one worker is killed.

    Args:
        kind: Class of the actors.
        folder: Where parts that are done lie.
        done: Their names, as a pattern.

    Yields:
        The killed process, after the body.
    """
    killed: list[int] = []

    def kill_one() -> None:
        while not list(folder.glob(done)):
            time.sleep(0.01)
        killed.append(workers(kind)[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)  # a body that fails leaves no part to wait for
    killer.start()
    yield killed
    killer.join()
