"""Measures reranking of one query's candidates against encoding them: CPU time on one thread, one model for both.

    python benchmarks/rerank.py [--candidates 50] [--rounds 2]

A reranker runs at every search; an embedder encodes candidates once, when they are indexed, and the query at every
search. Cases: texts of about 40 tokens, and JPEG files of 56 to 336 px a side. Model: the Qwen2-VL of random weights of
train_step.py, float32.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from train_step import LETTERS, write_qwen2_vl

from vlm2vec import Embedder
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.models.reranking.reranker import Reranker

PROMPT = RerankPrompt(system="Is the document relevant?", instruction="Find it.", answers=("y", "n"))
"""Words of this model's vocabulary, in which every letter is a token; about 60 tokens, as the default prompt has."""
QUERY = "a photograph of a dog on a beach"


def candidates(kind: str, count: int, folder: Path) -> list[Any]:
    """Creates distinct candidates of uneven length or size."""
    rng, shapes = random.Random(0), np.random.default_rng(0)
    if kind == "texts":
        return ["".join(rng.choices(LETTERS, k=rng.randrange(20, 61))) + str(i) for i in range(count)]
    paths = []
    for i in range(count):
        size = (rng.randrange(56, 337), rng.randrange(56, 337))
        image = Image.fromarray(shapes.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size)
        paths.append(folder / f"{i}.jpg")
        image.save(paths[-1])
    return paths


def best(rounds: int, work: Callable[[], Any]) -> float:
    times = []
    for _ in range(rounds):
        since = time.process_time()
        work()
        times.append(time.process_time() - since)
    return min(times)


def first_time(reranker: Reranker, items: list[Any]) -> None:
    """Reranks candidates whose images have not been read before."""
    if reranker.image_features is not None:
        reranker.image_features.forget()
    reranker.score(QUERY, items)


def measure(kind: str, folder: Path, count: int, rounds: int) -> dict[str, float]:
    """Seconds of encoding a query, encoding candidates, and reranking them."""
    embedder = Embedder.from_pretrained(str(folder), dtype=torch.float32, device="cpu")
    reranker = Reranker.from_pretrained(str(folder), prompt=PROMPT, dtype=torch.float32, device="cpu")
    items = candidates(kind, count, folder)
    embedder.encode_query(["warm up"])
    return {
        "encode the query": best(rounds, lambda: embedder.encode_query([QUERY])),
        "encode the candidates": best(rounds, lambda: embedder.encode_document(items)),
        "rerank": best(rounds, lambda: first_time(reranker, items)),
        "rerank for another query": best(rounds, lambda: reranker.score(QUERY, items)),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    ratios = {}
    print(f"{settings.candidates} candidates, best of {settings.rounds}, 1 thread, float32", flush=True)
    with tempfile.TemporaryDirectory() as name:
        write_qwen2_vl(Path(name))
        for kind in ("texts", "images"):
            found = measure(kind, Path(name), settings.candidates, settings.rounds)
            for what, seconds in found.items():
                ratio = seconds / found["encode the candidates"]
                print(f"{kind:<8}{what:<24}{seconds:>8.3f} s{ratio:>8.2f}", flush=True)
            ratios[f"x_rerank_{kind}"] = round(found["rerank"] / found["encode the candidates"], 2)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
