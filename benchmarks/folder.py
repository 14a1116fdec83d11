"""Measures `vlm2vec index` and `vlm2vec embed` on a folder of photographs, uninterrupted and killed halfway.

    python benchmarks/folder.py [--photos 5000] [--data ../shared/data/photos-mmeb]

Unpacks the photographs, then runs `vlm2vec index`, and `vlm2vec embed` to a store and to parquet, with the built-in
model: once uninterrupted, and once killed (SIGKILL) when about half of the parts are written and then restarted. The
table has the wall-clock and CPU seconds of the uninterrupted runs, the rows after the kill, the rows that the restart
added, its seconds, the rows at the end, and the lowest cosine of any vector to that of the uninterrupted run. The keys
must be equal; vectors may differ in the last bits, since `index` encodes the remaining inputs in other batches.
`x_uninterrupted` is the time of the uninterrupted run divided by the time of both starts.

Without the photographs the script measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from vlm2vec.retrieval.open import open_store

DATA = Path(__file__).parents[2] / "shared/data/photos-mmeb"
Rows = dict[str, np.ndarray]


def unpack(data: Path, number: int, folder: Path) -> None:
    """Writes the first photographs of the captioned training set into a folder."""
    folder.mkdir()
    with zipfile.ZipFile(data / "train/images_zip/Flickr8k.zip") as images:
        for name in [name for name in images.namelist() if name.endswith(".jpg")][:number]:
            (folder / Path(name).name).write_bytes(images.read(name))


def command(way: str, photos: Path, output: Path) -> list[str]:
    """Returns the command line for a kind of output."""
    head = [sys.executable, "-m", "vlm2vec.cli"]
    if way == "index":
        return [*head, "index", "compact", str(photos), "--store", str(output)]
    return [*head, "embed", "compact", str(photos), "--output", str(output), "--part", "512"]


def parts_done(way: str, output: Path) -> int:
    """Returns the number of completed units: commits of rows to a store, or parts next to the output."""
    if way == "index":
        return max(len(list((output / "data").glob("*.lance"))), 0) if output.exists() else 0
    return len(list(output.with_name(output.name + ".parts").glob("part-*.parquet")))


def rows_of(output: Path) -> Rows:
    """Returns the vectors by image name."""
    if output.suffix == ".parquet":
        table = pq.read_table(output)
        return {key: np.array(one, np.float32) for key, one in zip(*table.select(["key", "vector"]), strict=True)}
    found: Rows = {}
    for rows in open_store(str(output)).scan([], vectors=True):
        found |= zip([Path(key).name for key in rows.keys], rows.vectors_ND, strict=True)
    return found


def timed(arguments: list[str]) -> tuple[float, float, str]:
    """Runs a command to its end; returns wall-clock seconds, CPU seconds and output."""
    before, since = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - since, cpu, done.stdout


def killed(way: str, arguments: list[str], output: Path, at: int) -> float:
    """Starts a command and kills it after `at` parts; returns the seconds until then."""
    since = time.perf_counter()
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while parts_done(way, output) < at:
            if running.poll() is not None:
                raise SystemExit(f"{way}: ended with {running.returncode} before it was killed")
            time.sleep(0.05)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    return time.perf_counter() - since


def safe_rows(way: str, output: Path) -> int:
    """Returns the number of rows after a kill."""
    if way == "index":
        return open_store(str(output)).count()
    files = output.with_name(output.name + ".parts").glob("part-*.parquet")
    return sum(pq.ParquetFile(file).metadata.num_rows for file in files)


def measure(way: str, ending: str, photos: Path, work: Path, at: int) -> float:
    """Prints a line of the table; returns the time of the uninterrupted run divided by that of both starts."""
    whole, again = work / f"whole-{way}{ending}", work / f"killed-{way}{ending}"
    seconds, cpu, _ = timed(command(way, photos, whole))
    arguments = command(way, photos, again)
    first = killed(way, arguments, again, at)
    kept = safe_rows(way, again)
    second, _, _ = timed(arguments)
    expected, found = rows_of(whole), rows_of(again)
    if expected.keys() != found.keys():
        raise SystemExit(f"{way} {ending}: {len(found)} rows after the kill, {len(expected)} without")
    nearest = min(float(expected[key] @ found[key]) for key in expected)
    numbers = (seconds, cpu, kept, len(found) - kept, second, len(found), nearest)
    cells = "".join(f"{x:>15.{digits}f}" for x, digits in zip(numbers, (1, 1, 0, 0, 1, 0, 6), strict=True))
    print(f"{way + ' ' + ending:<18}{cells}", flush=True)
    return seconds / (first + second)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=int, default=500)
    parser.add_argument("--data", type=Path, default=DATA)
    settings = parser.parse_args()
    if not settings.data.is_dir():
        print(f"no photographs at {settings.data}: nothing measured\n{{}}")
        return
    heads = ("whole s", "CPU s", "after kill", "second start", "its s", "at the end", "lowest cosine")
    print(f"{settings.photos} photographs\n{'way':<18}" + "".join(f"{head:>15}" for head in heads))
    ratios = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        unpack(settings.data, settings.photos, work / "photos")
        half = max(settings.photos // 512 // 2, 1)
        for way, ending in (("index", ".lance"), ("embed", ".lance"), ("embed", ".parquet")):
            ratio = measure(way, ending, work / "photos", work, half)
            ratios[f"x_uninterrupted_{way}_{ending[1:]}"] = round(ratio, 2)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
