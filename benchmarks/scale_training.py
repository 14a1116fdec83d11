"""Cases of `benchmarks/scale.py` on training data: pairs, images before the first step, hard negatives."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scale_toys import Hashed, Work, peak_mib

from vlm2vec.data.mmeb.images import TRAIN_COLUMNS
from vlm2vec.data.mmeb.train_rows import TrainRows, read_train_set
from vlm2vec.evaluation.evaluate import PART
from vlm2vec.media.images import ImageRef
from vlm2vec.retrieval.cache_folder import KEY_BYTES
from vlm2vec.retrieval.embedding_cache import EmbeddingCache, InputKeys
from vlm2vec.training.check_images import read_images
from vlm2vec.training.mining import Finder, mine
from vlm2vec.training.nearest import BLOCK, MiningRule, mine_negatives


def mining_targets(folder: Path, rows: int, dim: int) -> Work:
    """`vlm2vec mine` of a block of pairs among all rows as distinct targets, read from an embedding cache."""
    random, cache = np.random.default_rng(0), EmbeddingCache(folder, {"model": "random"})
    centers = random.standard_normal((max(rows // 50, 2), dim), np.float32)
    keys = [number.to_bytes(KEY_BYTES, "big") for number in range(rows)]
    for start in range(0, rows, PART):
        part = keys[start : start + PART]
        noise = random.standard_normal((len(part), dim), np.float32) * np.float32(0.6)
        vectors_ND = centers[random.integers(len(centers), size=len(part))] + noise
        cache.put(part, vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True))
    targets_MD, own = cache.rows(keys), random.integers(rows, size=BLOCK).tolist()
    del keys
    queries_ND = targets_MD[own] + random.standard_normal((BLOCK, dim), np.float32) * np.float32(0.5 / dim**0.5)
    before, since = peak_mib(), time.process_time()
    mined = mine_negatives(queries_ND, targets_MD, own, [{row} for row in own], MiningRule(4))
    seconds = time.process_time() - since
    hours = seconds / BLOCK * rows / 3600
    return {
        "seconds": seconds,
        "negatives": sum(map(len, mined)),
        "MiB by mining": round(peak_mib() - before),
        "core hours for all rows as pairs": round(hours, 2),
    }


class RandomFinder(Finder):
    """The model of `mine` with vectors from hashes, kept in an embedding cache."""

    def __init__(self, folder: Path, dim: int) -> None:
        self.name, backbone = "random", SimpleNamespace(vision_cache=None)
        self.embedder: Any = SimpleNamespace(encode=Hashed(dim).encode, backbone=backbone)
        self.cache, self._key_of = EmbeddingCache(folder / "cache", {"model": "random"}), InputKeys()


def mining_all(folder: Path, rows: int, dim: int) -> Work:
    """`vlm2vec mine` of a set of text pairs with 5,000 distinct targets: read, encoded, mined, written."""
    (folder / "in/Set").mkdir(parents=True)
    columns = {name: [""] * rows for name in TRAIN_COLUMNS}
    columns["qry"] = [f"question {row}" for row in range(rows)]
    columns["pos_text"] = [f"answer {row % 5000}" for row in range(rows)]
    pq.write_table(pa.table(columns), folder / "in/Set/original-0.parquet")
    del columns
    since = time.process_time()
    rule, finder = MiningRule(2, margin=None), RandomFinder(folder, dim)
    means = mine("random", folder / "in", folder / "out", rule, open_finder=lambda model: finder)
    return {"seconds": time.process_time() - since, "negatives a pair": means["Set"]}


def training_pairs(folder: Path, rows: int, dim: int) -> Work:
    """Pairs in the MMEB-train layout: read, then an example made of every row in a forked data worker."""
    (folder / "VQA").mkdir()
    with pq.ParquetWriter(
        folder / "VQA/original-0.parquet", pa.schema([(name, "str") for name in TRAIN_COLUMNS])
    ) as out:
        for start in range(0, rows, 50_000):
            numbers = range(start, min(start + 50_000, rows))
            columns: dict[str, list[str]] = {name: [""] * len(numbers) for name in TRAIN_COLUMNS}
            ask = "<|image_1|>\nRepresent the given image with the following question: what is in place"
            columns["qry"] = [f"{ask} {i}?" for i in numbers]
            columns["qry_image_path"] = [f"images/VQA/Train/{i // 3:012d}.jpg" for i in numbers]
            columns["pos_text"] = [f"answer {i % 5000}" for i in numbers]
            out.write_table(pa.table(columns))
    since = time.process_time()
    pairs = read_train_set(folder, "VQA")
    seconds = time.process_time() - since
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    worker = fork.Process(target=_make_examples, args=(pairs, theirs))
    worker.start()
    made, copied = ours.recv()
    worker.join()
    each = {"bytes a pair": round(pairs.table.nbytes / rows), "us an example": round(made / rows * 1e6, 1)}
    return {"seconds": seconds, **each, "MiB a worker": round(copied / 2**20, 1)}


def _make_examples(pairs: TrainRows, answer: Connection) -> None:
    before, since = _private_bytes(), time.process_time()
    for number in np.random.default_rng(0).permutation(len(pairs)).tolist():
        pairs[number]
    answer.send((time.process_time() - since, _private_bytes() - before))


def _private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def image_check(folder: Path, rows: int, dim: int) -> Work:
    """The check before the first step, over links to 200 photographs of 640 x 480, at the first start and the next."""
    photos = []
    for number in range(200):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        photos.append(folder / f"photo-{number}.jpg")
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(photos[-1], quality=90)
    images = []
    for number in range(rows):
        path = folder / f"{number // 1000:04d}/{number:07d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.hardlink_to(photos[number % 200])
        images.append(ImageRef(path=str(path)))
    os.environ["VLM2VEC_CACHE"] = str(folder / "cache")
    model: Any = SimpleNamespace(backbone=SimpleNamespace(vision_cache=None))
    taken = []
    for _ in range(2):
        since = time.process_time()
        bad = read_images(model, images, lambda done: None)
        taken.append(time.process_time() - since)
    return {"seconds": taken[0], "s at the next start": round(taken[1], 2), "unreadable": len(bad)}
