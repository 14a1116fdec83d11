"""Shared by serve.py and serve_soak.py: the servers as processes, the inputs, and a lean HTTP client."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from encode import LETTERS
from PIL import Image
from pydantic import BaseModel

IMAGES_ONE_IN = 4


class Body(BaseModel):
    """The request of the plain app."""

    input: list[Any]


def plain_app() -> Any:
    """The simplest server: sentence-transformers behind FastAPI."""
    from fastapi import FastAPI
    from sentence_transformers import SentenceTransformer

    dtype = getattr(torch, os.environ["BENCH_DTYPE"])
    model = SentenceTransformer(os.environ["BENCH_MODEL"], device="cpu", model_kwargs={"dtype": dtype})
    lock = threading.Lock()  # concurrent forward passes are slower than sequential ones
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
    """The process of a server."""

    url: str
    process: psutil.Process

    def cpu(self) -> float:
        """CPU seconds used so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def rss(self) -> float:
        """Resident memory in MiB."""
        return float(self.process.memory_info().rss / 2**20)


@contextmanager
def server(name: str, folder: Path, settings: argparse.Namespace, extra: list[str]) -> Iterator[Running]:
    """Start one of the servers and wait until it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"BENCH_MODEL": str(folder), "BENCH_DTYPE": settings.dtype, "OMP_NUM_THREADS": str(settings.threads)}
    if name == "sentence_transformers":
        here = str(Path(__file__).parent)
        words = ["-m", "uvicorn", "--factory", "serve_load:plain_app", "--app-dir", here, "--port", str(port)]
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
    """Random texts of at least 4 tokens, with a median of about `usual` + 4; a token is a letter."""
    return ["".join(rng.choices(LETTERS, k=int(usual * rng.lognormvariate(0, 0.6)) + 4)) for _ in range(count)]


def image(rng: np.random.Generator) -> str:
    """A random JPEG as a data URI."""
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    data = io.BytesIO()
    coarse.resize((256, 192), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def workload(name: str, count: int, seed: int) -> list[Any]:
    """Distinct inputs of a workload."""
    usual = 4 if name == "queries" else 18
    words, shapes = texts_of(random.Random(seed), count, usual), np.random.default_rng(seed)
    imaged = IMAGES_ONE_IN if name == "mixed" else count + 1
    return [
        {"text": text, "image": image(shapes)} if i % imaged == imaged - 1 else text for i, text in enumerate(words)
    ]


class Wire:
    """One HTTP connection; with 64 connections a general client would use more CPU than the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def to(cls, running: Running) -> Wire:
        """Connect to a server."""
        host, _, port = running.url.removeprefix("http://").partition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def post(self, body: bytes, content_type: str = "application/json") -> tuple[int, bytes]:
        """Send a request and return status and body."""
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: here\r\nContent-Type: {content_type}\r\nContent-Length: "
        self._writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
        return int(lines[0].split()[1]), await self._reader.readexactly(length)

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()
