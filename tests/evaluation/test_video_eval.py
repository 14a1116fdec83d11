"""`vlm2vec eval` on golden video rows: model outputs equal those of the Hugging Face class for a single video."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from data.golden_mmeb import read_golden, write_golden
from tiny.fixtures import tiny_vlm  # noqa: F401
from tiny.videos import forward_by_hand, patches_by_hand
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.evaluation.benchmark import load_benchmark
from vlm2vec.evaluation.evaluate import distinct_inputs, read_tasks
from vlm2vec.retrieval.embedding_cache import EmbeddingCache, InputKeys
from vlm2vec.types import EmbeddingInput

SIZE = [56, 84]  # a multiple of the merged patch: no resizing


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """A retrieval and a question answering task."""
    tasks = []
    for name in ("MSVD", "NExTQA"):
        golden = read_golden(name)
        pictures = golden["files"]["pictures"]
        golden["files"]["pictures"] = {path: [*SIZE, *spec[2:]] for path, spec in pictures.items()}
        write_golden(golden, tmp_path / "data")
        facts = {"meta_task": "video_retrieval", "modality": "video", "metric": "hit@1", "scope": golden["scope"]}
        tasks.append({"name": name, "reader": "video", **facts})
    file = tmp_path / "videos.yaml"
    file.write_text(yaml.safe_dump({"name": "videos", "tasks": tasks, "source": {"eval": "data"}}))
    return file


def by_hand(folder: Path, item: EmbeddingInput) -> np.ndarray:
    text = item.text or ""
    if item.video is None:
        return forward_by_hand(folder, text)
    frames = [frame.load() for frame in item.video.sample(99).images]
    pixels, grid = patches_by_hand(folder, frames)
    prompt = text.replace("<|video_1|>", "<|video_pad|>" * (len(frames) // 2 * 2 * 3))
    length = len(transformers.AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"])
    positions = torch.arange(length).expand(3, 1, -1)  # without vision-start, as in the reference evaluation
    return forward_by_hand(folder, prompt, pixel_values_videos=pixels, video_grid_thw=grid, position_ids=positions)


def test_vectors_equal_a_direct_forward_with_pixel_values_videos(benchmark: Path, tiny_vlm, tmp_path: Path) -> None:  # noqa: F811
    model, cache = tiny_vlm("qwen2_vl"), tmp_path / "cache"
    command = ["eval", str(model), "--benchmark", str(benchmark), "-o", str(tmp_path / "out"), "--cache", str(cache)]
    result = CliRunner().invoke(app, [*command, "--option", "num_frames=3", "--option", "dtype=float32"])
    assert result.exit_code == 0, result.output
    (folder,) = cache.iterdir()
    vectors = EmbeddingCache(cache, json.loads((folder / "about.json").read_text()))
    tasks, key_of = read_tasks(*load_benchmark(benchmark)), InputKeys()
    inputs = distinct_inputs([*tasks["MSVD"], *tasks["NExTQA"]])
    videos = [item for item in inputs if item.video is not None and len(item.video.frames) % 2 == 0]
    assert len(videos) >= 7 and max(len(item.video.frames) for item in videos if item.video) == 8
    for item in [*videos, *(item for item in inputs if item.video is None)]:
        found = np.asarray(vectors.rows([key_of(item)])[:])
        assert (found * by_hand(model, item)).sum() >= 0.9999, item.text
