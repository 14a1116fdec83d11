"""The weights and golden vectors that ship with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from pretraining.ship import ship
from vlm2vec import Embedder, UserError
from vlm2vec.catalog import catalog
from vlm2vec.cli import app
from vlm2vec.models.backbones.compact import weights
from vlm2vec.models.verification import golden
from vlm2vec.models.verification.verify import report_saved


def test_the_built_in_model_gives_the_vectors_that_it_was_shipped_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "compact").mkdir()  # a folder of that name that is no checkpoint
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["verify", "compact"])
    assert done.exit_code == 0, done.output
    assert "compact: EQUAL to the saved golden vectors: 8 of 8" in done.output


def test_a_folder_of_its_name_is_verified_by_its_own_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Embedder.from_pretrained("compact", num_layers=1).save_pretrained(tmp_path / "compact")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"compact has no golden\.safetensors"):
        report_saved(Path("compact"), {})


def test_what_ships_is_a_few_megabytes() -> None:
    assert weights.SHIPPED.stat().st_size < 12e6


def test_shipping_writes_weights_checksum_and_golden_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = weights.SHIPPED
    monkeypatch.setattr(weights, "SHIPPED", tmp_path / shipped.name)
    digest = ship(shipped)
    for ending in (".safetensors", ".sha256"):
        assert (tmp_path / shipped.name).with_suffix(ending).read_bytes() == shipped.with_suffix(ending).read_bytes()
    assert digest in shipped.with_suffix(".sha256").read_text()
    new, old = (load_file(folder / golden.GOLDEN_FILE)["embeddings"] for folder in (tmp_path, shipped.parent))
    assert (new * old).sum(dim=1).min() > 0.9999


@pytest.mark.parametrize("model", ["compact", "compact-dual"])
def test_the_catalog_has_its_size_and_dimension(model: str) -> None:
    row = next(row for row in catalog(2048) if row.model == model)
    embedder = Embedder.from_pretrained(model)
    assert row.parameters == sum(weight.numel() for weight in embedder.backbone.parameters())
    assert row.dim == embedder.embedding_dim
