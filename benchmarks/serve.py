"""Throughput and latency of the server on loopback, compared with a plain sentence-transformers app.

    python benchmarks/serve.py [--requests 128] [--clients 1 8 64] [--repeats 1] [--threads 1] [--cpu-time]
    python benchmarks/serve.py --soak 600

One checkpoint (a LLaVA with random weights, see encode.py) behind three servers, each in its own process:

    ours                   `vlm2vec serve` with its defaults
    one at a time          the same with `max_batch_inputs=1`, which shows the gain from batching across requests
    sentence_transformers  a FastAPI app that calls `model.encode` on the inputs of one request at a time

All servers use the same precision and no caches, and no input occurs twice. A request holds one input. Workloads:
`queries` (texts of 4 to a few dozen tokens), `text` (median of 22 tokens), `mixed` (the same, with a JPEG data URI of
196 tokens in every fourth request). Every client sends its next request as soon as it has a response. For each
load, every server receives the same requests in turn, and the vectors are compared with the library's. Times are wall
clock: run it on a quiet machine. On a busy machine, `--cpu-time` compares the CPU time of the server processes.

`--soak SECONDS` runs serve_soak.py instead: 8 clients send two inputs per request to `vlm2vec serve` in float32, 5 % of
them of the kinds in serve_inputs.py. It counts responses that are not the library's vector (or not the expected
refusal), requests that failed, and memory at the end compared with minute 2 or a fifth of a shorter test.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from encode import write_llava
from serve_load import Running, Wire, server, workload
from serve_soak import soaked

from vlm2vec import Embedder

ROWS = ("ours", "one at a time", "sentence_transformers")
WORKLOADS = ("queries", "text", "mixed")
UNCACHED = ["--limit", "result_cache_bytes=0", "--limit", "image_cache_bytes=0"]
EXTRA = {"one at a time": ["--limit", "max_batch_inputs=1"]}


@dataclass
class Figures:
    """Measurements of one server under one load."""

    seconds: float = 0.0
    cpu: float = 0.0
    waits: list[float] = field(default_factory=list)
    vectors: dict[int, Any] = field(default_factory=dict)

    def line(self) -> str:
        """Requests per second, CPU ms per request, and latency percentiles 50, 95 and 99 in ms."""
        waits = np.percentile(np.array(self.waits) * 1000, [50, 95, 99])
        cpu = self.cpu / len(self.waits) * 1000
        return f"{len(self.waits) / self.seconds:>8.1f}{cpu:>8.1f}" + "".join(f"{wait:>8.0f}" for wait in waits)


async def load(running: Running, inputs: list[Any], num_clients: int) -> Figures:
    """Request every input once, with `num_clients` concurrent clients."""
    figures, answers = Figures(), dict[int, bytes]()
    left = [(index, json.dumps({"input": [value]}).encode()) for index, value in enumerate(inputs)][::-1]
    wires = [await Wire.to(running) for _ in range(num_clients)]

    async def client(wire: Wire) -> None:
        while left:
            index, body = left.pop()
            since = time.perf_counter()
            status, answers[index] = await wire.post(body)
            figures.waits.append(time.perf_counter() - since)
            if status != 200:
                sys.exit(answers[index].decode())

    since, cpu = time.perf_counter(), running.cpu()
    await asyncio.gather(*map(client, wires))
    figures.seconds, figures.cpu = time.perf_counter() - since, running.cpu() - cpu
    for wire in wires:
        wire.close()
    figures.vectors = {index: json.loads(answer)["data"][0]["embedding"] for index, answer in answers.items()}
    return figures


def lowest_cosine(vectors: dict[int, Any], want: np.ndarray) -> float:
    """The lowest cosine to the vectors of the library."""
    made = np.array([vectors[index] for index in range(len(want))])
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return float((made * want).sum(axis=1).min())


def table(folder: Path, settings: argparse.Namespace) -> dict[str, float]:
    """Measure every server under every load; return the ratios."""
    print(f"{settings.dtype}, {settings.threads} threads per server", flush=True)
    embedder = Embedder.from_pretrained(folder, device="cpu", dtype=getattr(torch, settings.dtype))
    best: dict[tuple[str, str, int], float] = {}
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(server(name, folder, settings, UNCACHED + EXTRA.get(name, []))) for name in ROWS
        }
        for one in running.values():
            asyncio.run(load(one, workload("mixed", 8, 99), 4))  # warm up
        waits = "".join(f"{name:>8}" for name in ("req/s", "CPU ms", "p50 ms", "p95 ms", "p99 ms"))
        print(f"{'load':<14}{'server':<24}{waits}{'lowest cosine':>15}")
        for case in settings.workloads:
            for num_clients in settings.clients:
                count = max(12, settings.requests // (4 if num_clients == 1 else 1))
                inputs = workload(case, count, num_clients)
                want = embedder.encode(inputs)
                for name in [name for _ in range(settings.repeats) for name in ROWS]:
                    figures = asyncio.run(load(running[name], inputs, num_clients))
                    cosine = lowest_cosine(figures.vectors, want)
                    key = (name, case, num_clients)
                    spent = figures.cpu if settings.cpu_time else figures.seconds
                    best[key] = max(best.get(key, 0.0), count / spent)
                    print(f"{case + f' x {num_clients}':<14}{name:<24}{figures.line()}{cosine:>15.6f}", flush=True)
                    if cosine < 0.999:
                        sys.exit(f"{name}: cosine {cosine:.6f}, expected 0.999 or more")
        rss = {name: one.rss() for name, one in running.items()}
    ratios = {
        f"x_{peer.replace(' ', '_')}_{case}_{num_clients}": best["ours", case, num_clients] / rate
        for (peer, case, num_clients), rate in best.items()
        if peer != "ours"
    }
    ratios["rss_x_sentence_transformers"] = rss["sentence_transformers"] / rss["ours"]
    return {name: round(value, 2) for name, value in ratios.items()}


def main() -> None:
    native = torch.cpu.get_capabilities().get("avx512_bf16")
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=128, help="requests per load; a quarter with a single client")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="threads of each server's model")
    parser.add_argument("--cpu-time", action="store_true", help="compare CPU time instead of wall-clock time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if native else "float32")
    parser.add_argument("--soak", type=float, help="run the soak test for this many seconds instead of the table")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        base, folder = Path(name) / "base", Path(name) / "model"
        base.mkdir()
        write_llava(base)
        Embedder.from_pretrained(base, device="cpu", dtype=torch.float32).save_pretrained(folder)
        print(json.dumps(soaked(folder, settings) if settings.soak else table(folder, settings)))


if __name__ == "__main__":
    main()
