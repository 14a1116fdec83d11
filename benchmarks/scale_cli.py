"""Runs `vlm2vec mine`, `index` and `eval` end to end over many rows: CPU time and peak memory of each process.

    python benchmarks/scale_cli.py [--rows 1000000] [--job eval mine index] [--folder scale/] [--model]

Every command is a process of its own, on one thread. Its figures are those of the operating system for the finished
process (as `/usr/bin/time -v` prints them). The commands load a real but tiny model: a CLIP with random weights, one
layer of 32 dimensions and vectors of 128. Its vectors are replaced by hashes of the texts, so the results are the cost
outside the model; `--model` encodes with it.

    eval   a thousandth of the rows as queries, each with 1,000 candidates of its own; every row is encoded
    mine   one training set of text pairs with distinct queries and 5,000 targets; the queries are the candidates of
           eval, so their vectors are in the embedding cache if eval has run before
    index  a table of JSON lines; every row is encoded
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scale_models import DIM, write_model
from scale_toys import Hashed, lines

from vlm2vec.cli import main
from vlm2vec.data.mmeb.images import TRAIN_COLUMNS
from vlm2vec.evaluation.evaluate import RESULTS_FILE
from vlm2vec.models.embedder import Embedder
from vlm2vec.retrieval.open import open_store
from vlm2vec.types import EmbeddingInput

WITH_HASHES = "vlm2vec-with-hashes"
TARGETS, CANDIDATES = 5000, 1000


def mine(folder: Path, rows: int) -> list[str]:
    """Writes the training set; returns the command."""
    (folder / "train/Set").mkdir(parents=True)
    columns = {name: [""] * rows for name in TRAIN_COLUMNS}
    columns["qry"] = [f"candidate {row}" for row in range(rows)]
    columns["pos_text"] = [f"answer {row % TARGETS}" for row in range(rows)]
    pq.write_table(pa.table(columns), folder / "train/Set/original-0.parquet")
    return ["mine", "clip", "train", "-o", "mined", "--num", "2", "--margin", "-2"]


def mined(folder: Path) -> str:
    """Negatives that were written."""
    (path,) = (folder / "mined/Set").glob("*.parquet")
    table = pq.read_table(path, columns=["neg_text"])["neg_text"].combine_chunks()
    found = len(table.flatten()) if pa.types.is_list(table.type) else len(table) - table.null_count
    return f"{len(table):,} pairs, {found:,} negatives"


def index(folder: Path, rows: int) -> list[str]:
    """Writes the table; returns the command."""
    lines(folder, rows)
    return ["index", "clip", "rows.jsonl", "--store", "rows.lance"]


def indexed(folder: Path) -> str:
    """Rows of the store."""
    return f"{open_store(f'{folder}/rows.lance').count():,} rows in the store"


def evaluation(folder: Path, rows: int) -> list[str]:
    """Writes the benchmark; returns the command."""
    (folder / "eval/Local").mkdir(parents=True)
    with (folder / "eval/Local/rows.jsonl").open("w") as file:
        for query in range(rows // CANDIDATES):
            candidates = [f"candidate {query * CANDIDATES + i}" for i in range(CANDIDATES)]
            file.write(json.dumps({"query": f"candidate {query}?", "candidates": candidates}) + "\n")
    task = "{name: scale, source: {eval: eval}, tasks: {Local: {reader: records}}}"
    (folder / "bench.yaml").write_text(task)
    return ["eval", "clip", "--benchmark", "bench.yaml", "-o", "scored"]


def evaluated(folder: Path) -> str:
    """What the results say."""
    found = json.loads((folder / "scored" / RESULTS_FILE).read_text())["tasks"]["Local"]
    return f"{found['num_queries']:,} queries, {found['num_candidates']:,} candidates each, hit@1 {found['score']:.3f}"


JOBS: dict[str, tuple[Callable[[Path, int], list[str]], Callable[[Path], str]]] = {
    "eval": (evaluation, evaluated),
    "mine": (mine, mined),
    "index": (index, indexed),
}


def with_hashes(words: list[str]) -> None:
    """Runs a command of `vlm2vec` in this process, with hashes in place of the model's vectors."""
    hashed = Hashed(DIM)

    def encode(self: Embedder, inputs: Sequence[EmbeddingInput], **_: Any) -> np.ndarray:
        return hashed.encode(inputs)

    Embedder.encode = Embedder.encode_document = encode  # type: ignore[assignment, method-assign]
    sys.argv = ["vlm2vec", *words]
    main()


def run(name: str, folder: Path, rows: int, program: list[str]) -> str:
    """Writes a job's rows, runs its command and returns a line of the table.

    Raises:
        SystemExit: if the command fails.
    """
    prepare, result = JOBS[name]
    words = prepare(folder, rows)
    places = {"VLM2VEC_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    threads = {"OMP_NUM_THREADS": "1", "LANCE_CPU_THREADS": "1"}
    since = time.monotonic()
    process = subprocess.Popen([sys.executable, *program, *words], cwd=folder, env={**os.environ, **places, **threads})
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - since
    if status:
        raise SystemExit(f"vlm2vec {' '.join(words)}: ended with status {os.waitstatus_to_exitcode(status)}")
    cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
    return f"| `vlm2vec {name}` | {rows:,} | {cpu:,.0f} | {seconds:,.0f} | {peak:,.0f} | {result(folder)} |"


def measure() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--job", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--model", action="store_true", help="encode with the tiny model")
    parser.add_argument("--folder", type=Path, default=None, help="keep the files here")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        program = ["-m", "vlm2vec"] if settings.model else [str(Path(__file__).resolve()), WITH_HASHES]
        write_model(folder / "clip")
        print("| command | rows | CPU s | wall s | peak MiB | result |")
        print("|---|--:|--:|--:|--:|---|", flush=True)
        for name in settings.job:
            print(run(name, folder, settings.rows, program), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [WITH_HASHES]:
        with_hashes(sys.argv[2:])
    else:
        measure()
