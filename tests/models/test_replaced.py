"""Built-in models that others replaced: names, folders and stores are refused in one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from samples import draw

from vlm2vec import Embedder, Reranker, UserError
from vlm2vec.cli import run
from vlm2vec.jobs.stores import facts_of
from vlm2vec.jobs.text_queries import FOLDER
from vlm2vec.models.checkpoints.replaced import REPLACED
from vlm2vec.retrieval.open import open_store

SMALL = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}
DECODER = "language_model.layers.0.self_attn.q_proj"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command ends."""
    assert run([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    return said


def old_folder(folder: Path, base: str, file: str, adapter: bool = True) -> Path:
    """A folder as earlier versions wrote it, with weights of a decoder."""
    folder.mkdir()
    about: dict[str, Any] = {"base": base, "options": {"num_layers": 4, "visual_tokens": 9, "image_size": 192}}
    about |= {"adapter": adapter}
    about |= {"embedding_dim": 576} if file == "embedder.json" else {"trained_head": True, "prompt": {}}
    (folder / file).write_text(json.dumps(about))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": "x"}))
    names = (f"base_model.model.{DECODER}.lora_A.weight",) if adapter else (f"{DECODER}.weight",)
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, folder / weights)
    return folder


@pytest.mark.parametrize("name", REPLACED)
def test_a_name_is_refused_as_model_base_and_recipe(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = f"{name}: this built-in model was replaced by {REPLACED[name]}; use {REPLACED[name]}, and index"
    with pytest.raises(UserError, match=expected):
        Embedder.from_pretrained(name)
    with pytest.raises(UserError, match=expected):
        Reranker.from_pretrained(name)
    (tmp_path / "pairs.csv").write_text("query,target\na,b\n" * 9)
    output = tmp_path / "run"
    assert expected in refused(capsys, "train", tmp_path / "pairs.csv", "--base", name, "-o", output)
    assert expected in refused(capsys, "train", name)
    assert expected in refused(capsys, "verify", name)
    assert not list(tmp_path.glob("run*"))


def test_a_folder_of_such_a_name_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Embedder.from_pretrained("compact", **SMALL).save_pretrained(tmp_path / "compact-embed")
    monkeypatch.chdir(tmp_path)
    assert Embedder.from_pretrained("compact-embed").embedding_dim == 384


@pytest.mark.parametrize("base", ["compact", "compact-dual"])
@pytest.mark.parametrize("adapter", [True, False])
def test_a_folder_trained_on_the_model_that_had_the_name_is_refused(base: str, adapter: bool, tmp_path: Path) -> None:
    folder = old_folder(tmp_path / "run", base, "embedder.json", adapter)
    with pytest.raises(UserError, match=f"run: was trained on an earlier .* {base}, .* train again with {base} as"):
        Embedder.from_pretrained(folder)


def test_a_folder_says_which_model_to_train_instead(tmp_path: Path) -> None:
    folder = old_folder(tmp_path / "run", "compact-sentence-dual", "embedder.json")
    with pytest.raises(UserError, match=r"compact-sentence-dual, .* train again with compact-dual"):
        Embedder.from_pretrained(folder)


def test_a_reranker_trained_on_the_model_that_had_the_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run: was trained on an earlier built-in model compact, which was replaced"):
        Reranker.from_pretrained(str(old_folder(tmp_path / "run", "compact", "reranker.json")))


def test_a_store_of_a_replaced_model_is_refused_before_a_text_side_of_its_time_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path / "cache"))
    facts = facts_of(Embedder.from_pretrained("compact", **SMALL), "compact-embed")
    store = str(tmp_path / "photos.lance")
    open_store(store, facts).close()
    (tmp_path / "cache" / FOLDER / facts.fingerprint).mkdir(parents=True)
    draw(tmp_path / "photos/red.png", "red", 0)
    expected = "compact-embed: this built-in model was replaced by compact; use compact, and index stores made with it"
    assert expected in refused(capsys, "search", "red", "--store", store)
    assert expected in refused(capsys, "search", "--image", tmp_path / "photos/red.png", "--store", store)
    assert expected in refused(capsys, "classify", store, "--labels", "red,blue")
    said = refused(capsys, "index", tmp_path / "photos", "--store", store)
    assert "was made with compact-embed and cannot be used with compact: another" in said
