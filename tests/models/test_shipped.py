"""The checkpoint that ships with the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlm2vec import Embedder, UserError
from vlm2vec.catalog import catalog
from vlm2vec.cli import app
from vlm2vec.models import registry
from vlm2vec.models.registry import SHIPPED, shipped_folder

(FOLDER, DIGEST) = SHIPPED["compact-embed"]


def test_the_shipped_model_gives_the_vectors_that_it_was_shipped_with() -> None:
    done = CliRunner().invoke(app, ["verify", "compact-embed"])
    assert done.exit_code == 0, done.output
    assert "EQUAL to the saved golden vectors: 8 of 8" in done.output


def test_it_is_an_adapter_on_compact_of_a_few_megabytes() -> None:
    assert json.loads((FOLDER / "embedder.json").read_text())["base"] == "compact"
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 8e6
    assert not any(name in path.read_text() for path in FOLDER.glob("*.json") for name in ("/home/", "/tmp/", "/root/"))


def test_changed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FOLDER, tmp_path / "changed")
    with (tmp_path / "changed/adapter_model.safetensors").open("ab") as weights:
        weights.write(b"0")
    monkeypatch.setitem(registry.SHIPPED, "compact-embed", (tmp_path / "changed", DIGEST))
    with pytest.raises(UserError, match="SHA-256 differs from the shipped weights"):
        shipped_folder("compact-embed")


@pytest.mark.parametrize("model", ["compact-embed", "compact-sentence"])
def test_the_catalog_has_its_size_and_dimension(model: str) -> None:
    row = next(row for row in catalog(2048) if row.model == model)
    embedder = Embedder.from_pretrained(model)
    assert row.parameters == sum(weight.numel() for weight in embedder.backbone.parameters())
    assert row.dim == embedder.embedding_dim
