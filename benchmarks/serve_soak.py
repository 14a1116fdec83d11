"""The soak test of serve.py: mostly valid inputs with 5 % bad ones; counts wrong answers and memory growth.

Bad inputs are drawn from the kinds that clients send by mistake or on purpose: truncated images, decompression bombs,
places that the server does not read, a million characters, text beyond the model's limit, broken data URIs.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from serve_load import Running, Wire, server, workload

from vlm2vec import Embedder

SOAK_CLIENTS, SOAK_INPUTS, BAD_SHARE = 8, 2, 0.05


def bad_inputs() -> list[Any]:
    """Inputs that the server must refuse, without affecting other inputs."""
    png = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(png, "PNG")
    whole = png.getvalue()
    bomb = whole[:16] + (60_000).to_bytes(4, "big") * 2 + whole[24:]
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    images = [base64.b64encode(data).decode() for data in (whole[: len(whole) // 2], bomb, svg, bytes(1000))]
    return [
        *({"image": f"data:image/png;base64,{data}"} for data in images),
        *({"image": name} for name in ("file:///etc/passwd", "http://127.0.0.1/a.png", "../a.png", "a\0.png")),
        {},
        "\ud800",
        "x" * 1_000_000,
        "data:image/png,not base64",
        "data:;base64,???",
    ]


@dataclass
class Soak:
    """Counts of a soak test."""

    requests: int = 0
    good: int = 0
    bad: int = 0
    wrong: int = 0
    failed: int = 0
    rss: list[tuple[float, float]] = field(default_factory=list)

    def near(self, second: float) -> float:
        """Memory in MiB around a second of the test: the median of the ten nearest samples."""
        return float(np.median(sorted(self.rss, key=lambda one: abs(one[0] - second))[:10], axis=0)[1])


async def soak(running: Running, pool: list[Any], want: np.ndarray, seconds: float) -> Soak:
    """Send inputs of the pool mixed with bad ones, and check every response."""
    found, end, since, evil = Soak(), time.monotonic() + seconds, time.monotonic(), bad_inputs()

    def check(places: list[int | None], status: int, answer: bytes) -> None:
        found.requests += 1
        if status != 200:
            found.failed += 1
            return
        data = json.loads(answer)["data"]
        vectors = {item["index"]: np.array(item["embedding"], dtype=np.float32) for item in data}
        for index, place in enumerate(places):
            found.bad, found.good = found.bad + (place is None), found.good + (place is not None)
            if place is None or index not in vectors:
                found.wrong += (place is None) == (index in vectors)
                continue
            cosines = want @ vectors[index]
            found.wrong += bool(cosines[place] < 0.9999 or cosines.argmax() != place)

    async def client(rng: random.Random) -> None:
        wire = await Wire.to(running)
        while time.monotonic() < end:
            places = [None if rng.random() < BAD_SHARE else rng.randrange(len(pool)) for _ in range(SOAK_INPUTS)]
            inputs = [rng.choice(evil) if place is None else pool[place] for place in places]
            body = json.dumps({"input": inputs, "partial": True}).encode()
            check(places, *await wire.post(body))

    async def watch() -> None:
        while time.monotonic() < end:
            found.rss.append((time.monotonic() - since, running.rss()))
            await asyncio.sleep(min(1.0, seconds / 60))

    await asyncio.gather(watch(), *(client(random.Random(seed)) for seed in range(SOAK_CLIENTS)))
    return found


def soaked(folder: Path, settings: argparse.Namespace) -> dict[str, float]:
    """Run the soak test in float32, so that wrong vectors are detected."""
    settings.dtype = "float32"
    embedder = Embedder.from_pretrained(folder, device="cpu", dtype=torch.float32)
    pool = workload("mixed", 400, 7)
    want = embedder.encode(pool)
    with server("ours", folder, settings, ["--limit", "result_cache_bytes=100000"]) as running:
        found = asyncio.run(soak(running, pool, want, settings.soak))
        alive = httpx.get(f"{running.url}/health/ready", timeout=60).status_code == 200
    early, late = found.near(min(120.0, settings.soak / 5)), found.near(settings.soak)
    print(
        f"{found.requests} requests, {found.good} good and {found.bad} bad inputs: {found.wrong} wrong, "
        f"{found.failed} requests not 200; {early:.0f} MiB early, {late:.0f} MiB at the end; ready at the end: {alive}"
    )
    return {
        "soak_seconds": settings.soak,
        "soak_inputs": found.good + found.bad,
        "soak_wrong": found.wrong,
        "soak_not_200": found.failed,
        "soak_rss_growth": round(late / early, 4),
        "soak_ready": int(alive),
    }
