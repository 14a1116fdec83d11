"""Text queries by the built-in model's text side: the model's vectors, without importing PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import draw
from typer.testing import CliRunner

from vlm2vec import Embedder, EmbeddingInput
from vlm2vec.cli import app
from vlm2vec.jobs.stores import facts_of
from vlm2vec.jobs.text_queries import FOLDER, keep_text_side, text_side_of

TEXTS = ["a dog on the beach", "x", "two men play football in the rain " * 100, "Ünïcode 🐶 [SEP] text"]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.from_pretrained("compact", dtype=torch.float32)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path))
    return tmp_path


def test_the_text_side_gives_the_vectors_of_the_model(embedder: Embedder, cache: Path) -> None:
    facts = facts_of(embedder, "compact", dtype=torch.float32)
    assert text_side_of(facts) is None
    keep_text_side(embedder, facts)
    text_side = text_side_of(facts)
    assert text_side is not None
    items = [EmbeddingInput(text) for text in TEXTS] + [EmbeddingInput("red", instruction="Find the image.")]
    np.testing.assert_allclose(text_side.encode_query(items), embedder.encode_query(items), atol=1e-6)


def test_a_folder_keeps_no_text_side(cache: Path) -> None:
    small = Embedder.from_pretrained("compact", num_layers=1, visual_tokens=4, image_size=64)
    folder = small.save_pretrained(cache / "model")
    keep_text_side(small, facts_of(small, str(folder)))
    assert not (cache / FOLDER).exists()


def test_a_text_search_imports_neither_torch_nor_transformers(embedder: Embedder, tmp_path: Path) -> None:
    for name in ("red", "blue"):
        draw(tmp_path / f"photos/{name}.png", name, 0)
    store = str(tmp_path / "photos.lance")
    done = CliRunner().invoke(app, ["index", str(tmp_path / "photos"), "--store", store], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    code = (
        "import sys; from vlm2vec.cli import run\n"
        f"status = run(['search', 'a red star', '--store', {store!r}, '--json'])\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); sys.exit(status or ', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    quick = {hit["key"]: hit["score"] for hit in json.loads(done.stdout)}
    images = [tmp_path / f"photos/{name}.png" for name in ("red", "blue")]
    usual = embedder.similarity(embedder.encode_query(["a red star"]), embedder.encode_document(images))[0]
    assert quick == pytest.approx(dict(zip(map(str, images), map(float, usual), strict=True)), abs=0.02)
