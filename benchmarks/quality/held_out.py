"""Splits training sets in the MMEB layout into training sets and a benchmark of held-out queries."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

HELD_OUT = 10  # one query in ten
Rows = list[dict[str, Any]]


def rewrite(source: Path, output: Path, files: str, change: Callable[[str, Rows], Rows], images: Sequence[str]) -> Path:
    """Writes a modified copy of every set in a folder, with links to its images."""
    for file in sorted(source.glob(f"*/{files}")):
        rows = change(file.parent.name, pq.read_table(file).to_pylist())
        target = output / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), target)
    for name in images:
        link = output / name
        if (source / name).exists() and not link.is_symlink():
            link.symlink_to((source / name).resolve())
    return output


def is_held(row: Mapping[str, str]) -> bool:
    digest = hashlib.blake2b(f"{row['qry']} {row['qry_image_path']}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) % HELD_OUT == 0


def question(row: Mapping[str, Any], pool: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Converts a training row to a query: its target first, then the rest of a pool of (text, image)."""
    gold = (row["pos_text"], row["pos_image_path"])
    texts, paths = zip(gold, *[target for target in pool if target != gold], strict=True)
    query = {"qry_text": row["qry"], "qry_img_path": row["qry_image_path"]}
    return {**query, "tgt_text": list(texts), "tgt_img_path": list(paths)}


def write_held_out(
    source: Path,
    output: Path,
    kept: Callable[[str, Rows], Rows],
    asked: Callable[[str, Rows], Rows],
    tasks: Mapping[str, str],
) -> tuple[Path, Path]:
    """Writes training sets of the kept rows and a benchmark of the held-out rows; fills `tasks`, meta-task by set."""
    images = ("images", "images_zip")
    rewrite(source, output / "train", "original-*.parquet", kept, images)
    rewrite(source, output / "questions", "original-*.parquet", asked, images)
    for file in (output / "questions").glob("*/original-*.parquet"):
        file.rename(file.with_name(file.name.replace("original", "test")))
    rows = [{"name": name, "meta_task": meta, "metric": "hit@1"} for name, meta in tasks.items()]
    content = {"name": "held-out", "tasks": rows, "source": {"eval": "questions"}}
    (output / "benchmark.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return output / "train", output
