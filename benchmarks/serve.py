"""Requests a second and waiting times of the server on loopback, ours beside a plain sentence-transformers app.

    python benchmarks/serve.py [--requests 128] [--clients 1 8 64] [--repeats 1] [--threads 1] [--processor-time]
    python benchmarks/serve.py --soak 600

One checkpoint (a LLaVA with random weights, see encode.py) behind three servers, each a process of its own:

    ours                   `vlm2vec serve`, its defaults
    one at a time          the same with `max_batch_inputs=1`: what batching across requests gains
    sentence_transformers  a FastAPI app that calls `model.encode` on the inputs of a request, one request at a time

All in the same precision, without caches of results or images, and no input comes twice. A request holds one input.
Workloads: `queries` (texts of 4 to some dozen tokens), `text` (22 at the median), `mixed` (the same, every fourth with
an image of 196 tokens, a JPEG as a data URI). Every client asks again as soon as it is answered; each load takes the
same number of requests from every server, in turns, and vectors are compared with the library's. Times on the clock:
run it on a quiet machine. On one that does other work `--processor-time` compares what the servers' processes computed.

`--soak SECONDS` asks `vlm2vec serve` in float32 with 8 clients instead, two inputs a request, 5 % of them bad ones
beside good ones: truncated images, bombs, places that are not read, a million characters. It counts answers that are
not the library's vector (or not the refusal that was due), requests without status 200, and memory at the end against
minute 2.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
import transformers
from encode import LETTERS, write_llava
from PIL import Image
from pydantic import BaseModel

from vlm2vec import Embedder

ROWS = ("ours", "one at a time", "sentence_transformers")
WORKLOADS = ("queries", "text", "mixed")
UNCACHED = ["--limit", "result_cache_bytes=0", "--limit", "picture_cache_bytes=0"]
EXTRA = {"one at a time": ["--limit", "max_batch_inputs=1"]}
IMAGES_ONE_IN = 4
SOAK_CLIENTS, SOAK_INPUTS, BAD_SHARE = 8, 2, 0.05


class Body(BaseModel):
    """The plain app's request."""

    input: list[Any]


def plain_app() -> Any:
    """What one writes in an afternoon: sentence-transformers behind FastAPI."""
    from fastapi import FastAPI
    from sentence_transformers import SentenceTransformer

    dtype = getattr(torch, os.environ["BENCH_DTYPE"])
    model = SentenceTransformer(os.environ["BENCH_MODEL"], device="cpu", model_kwargs={"dtype": dtype})
    lock = threading.Lock()  # threads that forward at the same time are slower than one after the other
    app = FastAPI()

    def as_value(one: Any) -> Any:
        if isinstance(one, str):
            return one
        image = Image.open(io.BytesIO(base64.b64decode(one["image"].partition(",")[2]))).convert("RGB")
        return {"text": one["text"], "image": image}

    @app.post("/v1/embeddings")
    def embeddings(body: Body) -> dict[str, Any]:
        values = [as_value(one) for one in body.input]
        with lock:
            vectors = model.encode(values, normalize_embeddings=True, convert_to_tensor=True).float().tolist()
        return {"data": [{"index": index, "embedding": vector} for index, vector in enumerate(vectors)]}

    @app.get("/health/ready")
    def ready() -> dict[str, str]:
        return {"status": "ok"}

    return app


@dataclass
class Running:
    """A server's process."""

    url: str
    process: psutil.Process

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def rss(self) -> float:
        """MiB of the process."""
        return float(self.process.memory_info().rss / 2**20)


@contextmanager
def server(name: str, folder: Path, settings: argparse.Namespace, extra: list[str]) -> Iterator[Running]:
    """Starts one of the servers and waits until it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"BENCH_MODEL": str(folder), "BENCH_DTYPE": settings.dtype, "OMP_NUM_THREADS": str(settings.threads)}
    if name == "sentence_transformers":
        here = str(Path(__file__).parent)
        words = ["-m", "uvicorn", "--factory", "serve:plain_app", "--app-dir", here, "--port", str(port)]
        words += ["--log-level", "warning"]
    else:
        words = ["-m", "vlm2vec.cli", "serve", str(folder), "--port", str(port), "--dtype", settings.dtype, *extra]
    with (folder.parent / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *words], env={**os.environ, **about}, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            if process.poll() is not None:
                sys.exit((folder.parent / f"{name}.log").read_text())
            try:
                if httpx.get(f"{url}/health/ready", timeout=10).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield Running(url, psutil.Process(process.pid))
    finally:
        process.kill()
        process.wait()


def texts_of(rng: random.Random, count: int, usual: float) -> list[str]:
    """Texts of some tokens more than 3, half of them of fewer than `usual` more; a token is a letter."""
    return ["".join(rng.choices(LETTERS, k=int(usual * rng.lognormvariate(0, 0.6)) + 4)) for _ in range(count)]


def image(rng: np.random.Generator) -> str:
    """A JPEG as a data URI."""
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    data = io.BytesIO()
    coarse.resize((256, 192), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def workload(name: str, count: int, seed: int) -> list[Any]:
    """Inputs, none of them twice."""
    usual = 4 if name == "queries" else 18
    words, shapes = texts_of(random.Random(seed), count, usual), np.random.default_rng(seed)
    imaged = IMAGES_ONE_IN if name == "mixed" else count + 1
    return [
        {"text": text, "image": image(shapes)} if i % imaged == imaged - 1 else text for i, text in enumerate(words)
    ]


@dataclass
class Figures:
    """What a server did with a workload."""

    seconds: float = 0.0
    cpu: float = 0.0
    waits: list[float] = field(default_factory=list)
    vectors: dict[int, Any] = field(default_factory=dict)

    def line(self) -> str:
        """Requests a second, processor ms of the server a request, and how long half, 95 %, 99 % waited at most."""
        waits = np.percentile(np.array(self.waits) * 1000, [50, 95, 99])
        cpu = self.cpu / len(self.waits) * 1000
        return f"{len(self.waits) / self.seconds:>8.1f}{cpu:>8.1f}" + "".join(f"{wait:>8.0f}" for wait in waits)


class Wire:
    """A connection that asks and waits; a general client would cost more than the server at 64 connections."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def to(cls, running: Running) -> Wire:
        """To a server."""
        host, _, port = running.url.removeprefix("http://").partition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        head = "POST /v1/embeddings HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: "
        self._writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
        return int(lines[0].split()[1]), await self._reader.readexactly(length)

    def close(self) -> None:
        """Leaves."""
        self._writer.close()


async def load(running: Running, inputs: list[Any], num_clients: int) -> Figures:
    """Asks for every input, `num_clients` at a time."""
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
    """To the library's vectors."""
    made = np.array([vectors[index] for index in range(len(want))])
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return float((made * want).sum(axis=1).min())


def table(folder: Path, settings: argparse.Namespace) -> dict[str, float]:
    """Every server under every load; the ratios."""
    print(f"{settings.dtype}, {settings.threads} threads a server", flush=True)
    embedder = Embedder.from_pretrained(folder, device="cpu", dtype=getattr(torch, settings.dtype))
    best: dict[tuple[str, str, int], float] = {}
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(server(name, folder, settings, UNCACHED + EXTRA.get(name, []))) for name in ROWS
        }
        for one in running.values():
            asyncio.run(load(one, workload("mixed", 8, 99), 4))  # warm
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
                    spent = figures.cpu if settings.processor_time else figures.seconds
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


def bad_inputs() -> list[Any]:
    """What clients send by mistake or in malice; each is to be refused alone."""
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
    ]


@dataclass
class Soak:
    """What a soak counts."""

    requests: int = 0
    good: int = 0
    bad: int = 0
    wrong: int = 0
    failed: int = 0
    rss: list[tuple[float, float]] = field(default_factory=list)

    def near(self, second: float) -> float:
        """MiB around a second of the soak: the median of ten samples."""
        return float(np.median(sorted(self.rss, key=lambda one: abs(one[0] - second))[:10], axis=0)[1])


async def soak(running: Running, pool: list[Any], want: np.ndarray, seconds: float) -> Soak:
    """Asks for good inputs of the pool and bad ones among them, and checks every answer."""
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
    """Runs the soak in float32, where a wrong vector shows."""
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


def main() -> None:
    native = torch.cpu.get_capabilities().get("avx512_bf16")
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=128, help="of a load; a quarter of them with one client")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each server's model")
    parser.add_argument("--processor-time", action="store_true", help="ratios of the servers' processor time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if native else "float32")
    parser.add_argument("--soak", type=float, help="seconds; instead of the table")
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
