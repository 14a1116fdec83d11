"""Embeds a text file with a toy encoder, killed (SIGKILL) at every step in turn, before or after it, then finished.

A step is a rename, and where a store is written also a commit of rows or the removal of a folder.

    python killed.py INPUT FOLDER ENDING

Prints a JSON line for every kill: how the killed process ended, and how many inputs the second one encoded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # noqa: F401 - pyarrow imports it at the first array: once here, not in every fork

from vlm2vec.jobs.embed import EmbedSettings, Job, was_finished
from vlm2vec.jobs.sources import open_source
from vlm2vec.retrieval.vector_store import StoreFacts
from vlm2vec.types import EmbeddingInput

FACTS = StoreFacts("toy", "f" * 16, 8, about={"weights": "toy"})
MOST_KILLS = 30


class Toy:
    def __init__(self) -> None:
        self.num_encoded = 0

    def encode_document(self, inputs: Sequence[EmbeddingInput], **_: Any) -> np.ndarray:
        self.num_encoded += len(inputs)
        digests = [hashlib.sha256((item.text or "").encode()).digest() for item in inputs]
        return np.array([list(digest[:8]) for digest in digests], np.float32).reshape(-1, 8)


def embed(source: Path, output: Path) -> int:
    encoder = Toy()
    ended = output.exists() and not output.with_name(f"{output.name}.parts").exists()
    if ended or was_finished(output):
        return 0
    job = Job(open_source(source), output, EmbedSettings(part=4), FACTS)
    job.run(encoder)
    job.finish()
    return encoder.num_encoded


def kill_at(number: int, when: str, ending: str) -> None:
    """Ends this process at its so-many-th step."""
    count = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            mine = count == number  # before the call: a folder's removal may be made of steps of its own
            if when == "before" and mine:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return step

    os.replace = dying(os.replace)
    if ending == ".lance":
        from vlm2vec.retrieval.lance_store import LanceStore

        LanceStore.add = dying(LanceStore.add)  # type: ignore[method-assign]
        shutil.rmtree = dying(shutil.rmtree)


def forked(work: Any) -> tuple[int, int]:
    """Exit status and the number that `work` returned, from a process of its own."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        status = os.waitpid(child, 0)[1]
        with os.fdopen(read) as answer:
            return status, int(answer.read() or -1)
    try:
        os.write(write, str(work()).encode())
        os._exit(0)
    finally:
        os._exit(1)


def main() -> None:
    source, folder, ending = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if ending == ".lance":
        import lancedb  # noqa: F401 - as pandas; nothing of it has run where a process is forked
    forked(lambda: embed(source, folder / f"whole{ending}"))
    for when in ("before", "after"):
        for number in range(1, MOST_KILLS):
            output = folder / f"{when}-{number}" / f"out{ending}"

            def killed(number: int = number, when: str = when, output: Path = output) -> int:
                kill_at(number, when, ending)
                return embed(source, output)

            status, _ = forked(killed)
            if status == 0:  # there are no more steps
                break
            again = forked(lambda output=output: embed(source, output))
            kill = {"output": str(output), "killed": status, "again": again[0], "encoded": again[1]}
            sys.stdout.write(json.dumps(kill) + "\n")


if __name__ == "__main__":
    main()
