"""The soak test of serve.py: mostly usual inputs, with 5 % unusual ones of the kinds in serve_inputs.py.

It counts wrong answers and memory growth. Half of the unusual kinds are valid and must give the library's vector; the
others must be refused, without affecting the other inputs of their request. Another 5 % of the requests are refused as
a whole. Unusual inputs and requests are taken in turn, so that a short test includes all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from serve_inputs import BadRequest, Unusual, bad_requests, unusual_inputs
from serve_load import Running, Wire, server, workload

from vlm2vec import Embedder

SOAK_CLIENTS, SOAK_INPUTS, UNUSUAL_SHARE, BAD_REQUEST_SHARE = 8, 2, 0.05, 0.05
MOST_MESSAGE = 500  # characters of an error message; values of a request are cut


@dataclass(frozen=True)
class Sample:
    """An input with the row of its vector; None: it must be refused."""

    kind: str
    value: Any
    row: int | None


@dataclass
class Soak:
    """Counts of a soak test."""

    requests: int = 0
    bad_requests: int = 0
    failed: int = 0
    inputs: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    rss: list[tuple[float, float]] = field(default_factory=list)

    def near(self, second: float) -> float:
        """Memory in MiB around a second of the test: the median of the ten nearest samples."""
        return float(np.median(sorted(self.rss, key=lambda one: abs(one[0] - second))[:10], axis=0)[1])

    def check(self, samples: list[Sample], status: int, answer: bytes, want: np.ndarray) -> None:
        """Compare a response with the vectors of the library and the expected refusals."""
        self.requests += 1
        self.inputs.update(sample.kind for sample in samples)
        if status != 200:
            self.failed += 1
            return
        content = json.loads(answer)
        vectors = {item["index"]: np.array(item["embedding"], dtype=np.float32) for item in content["data"]}
        messages = {item["index"]: item["message"] for item in content.get("errors") or []}
        for index, sample in enumerate(samples):
            if sample.row is None:
                right = index not in vectors and 0 < len(messages.get(index, "")) <= MOST_MESSAGE
            else:
                cosines = want @ vectors[index] if index in vectors else np.zeros(len(want))
                right = bool(cosines[sample.row] >= 0.9999 and cosines[sample.row] >= cosines.max() - 1e-6)
            self.wrong[sample.kind] += not right

    def check_bad(self, request: BadRequest, status: int, answer: bytes) -> None:
        """Check that a request was refused with a short message."""
        self.bad_requests += 1
        self.inputs[request.kind] += 1
        right = 400 <= status < 500 and len(json.loads(answer)["error"]["message"]) <= MOST_MESSAGE
        self.failed += status >= 500
        self.wrong[request.kind] += not right


def samples_of(usual: list[Any], unusual: list[Unusual]) -> tuple[list[Sample], list[Sample], list[Any]]:
    """Usual and unusual samples, and the inputs of the library whose vectors they expect."""
    library = list(usual)
    rows: dict[Any, int] = {}
    found = []
    for one in unusual:
        row = None
        if one.expected is not None:
            key = one.expected["image"] if isinstance(one.expected, dict) else one.expected
            row = rows.setdefault(key, len(library))
            library += [one.expected] if row == len(library) else []
        found.append(Sample(one.kind, one.value, row))
    return [Sample("usual", value, row) for row, value in enumerate(usual)], found, library


async def soak(running: Running, usual: list[Sample], unusual: list[Sample], want: np.ndarray, seconds: float) -> Soak:
    """Send usual samples mixed with unusual ones, and check every response."""
    found, since = Soak(), time.monotonic()
    unusual_in_turn, bad_in_turn = cycle(unusual), cycle(bad_requests())

    async def refused(request: BadRequest) -> None:
        wire = await Wire.to(running)  # the server may close the connection after its answer
        found.check_bad(request, *await wire.post(request.body, request.content_type))
        wire.close()

    async def client(rng: random.Random) -> None:
        wire = await Wire.to(running)
        while time.monotonic() < since + seconds:
            if rng.random() < BAD_REQUEST_SHARE:
                await refused(next(bad_in_turn))
            samples = [
                next(unusual_in_turn) if rng.random() < UNUSUAL_SHARE else rng.choice(usual) for _ in range(SOAK_INPUTS)
            ]
            body = json.dumps({"input": [sample.value for sample in samples], "partial": True}).encode()
            found.check(samples, *await wire.post(body), want)

    async def watch() -> None:
        while time.monotonic() < since + seconds:
            found.rss.append((time.monotonic() - since, running.rss()))
            await asyncio.sleep(min(1.0, seconds / 60))

    await asyncio.gather(watch(), *(client(random.Random(seed)) for seed in range(SOAK_CLIENTS)))
    return found


def soaked(folder: Path, settings: argparse.Namespace) -> dict[str, float]:
    """Run the soak test in float32, so that wrong vectors are detected."""
    settings.dtype = "float32"
    embedder = Embedder.from_pretrained(folder, device="cpu", dtype=torch.float32)
    usual, unusual, library = samples_of(workload("mixed", 400, 7), unusual_inputs())
    want = embedder.encode(library)
    with server("ours", folder, settings, ["--limit", "result_cache_bytes=100000"]) as running:
        found = asyncio.run(soak(running, usual, unusual, want, settings.soak))
        alive = httpx.get(f"{running.url}/health/ready", timeout=60).status_code == 200
    minutes = [60.0 * minute for minute in range(1, int(settings.soak // 60) + 1)]
    print("MiB at each minute:", *(f"{found.near(minute):.0f}" for minute in minutes))
    early, late = found.near(min(120.0, settings.soak / 5)), found.near(settings.soak)
    for kind, count in sorted(found.inputs.items()):
        print(f"{kind:<30}{count:>8}{found.wrong[kind]:>6} wrong")
    print(
        f"{found.requests} requests and {found.bad_requests} bad ones: {found.wrong.total()} wrong, {found.failed} "
        f"failed; {early:.0f} MiB early, {late:.0f} MiB at the end; ready at the end: {alive}"
    )
    return {
        "soak_seconds": settings.soak,
        "soak_inputs": found.inputs.total(),
        "soak_wrong": found.wrong.total(),
        "soak_failed": found.failed,
        "soak_rss_growth": round(late / early, 4),
        "soak_ready": int(alive),
    }
