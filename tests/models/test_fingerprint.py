"""The fingerprint changes with every part of the description, and with nothing else."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.fixtures import tiny_vlm  # noqa: F401

from vlm2vec import Embedder
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.verification import fingerprint
from vlm2vec.models.verification.fingerprint import describe


@pytest.fixture(scope="module")
def folder(tiny_vlm) -> str:  # noqa: F811
    return str(tiny_vlm("qwen2_vl"))


def load(folder: str, **settings: object) -> Embedder:
    return Embedder.from_pretrained(folder, dtype=torch.float32, **settings)


def changed(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one if one[name] != other[name]}


def test_loading_again_gives_the_same_description(folder: str) -> None:
    assert describe(load(folder), "m") == describe(load(folder), "m")


def test_every_part_that_decides_vectors_changes_its_own_entry(folder: str) -> None:
    plain = describe(load(folder), "m")
    weights = load(folder)
    with torch.no_grad():
        next(weights.parameters()).view(-1)[0] += 1e-3
    assert changed(plain, describe(weights, "m")) == {"weights"}
    template = load(folder)
    template.backbone.template = replace(template.backbone.template, separator=": ")
    assert changed(plain, describe(template, "m")) == {"template"}
    assert changed(plain, describe(load(folder, max_pixels=28 * 28 * 8), "m")) == {"processor", "resolution"}
    narrow = Embedder.from_pretrained(folder, dtype=torch.bfloat16)
    assert changed(plain, describe(narrow, "m")) == {"weights", "precision"}
    pooled = load(folder)
    pooled.backbone.pooling = "mean"
    assert changed(plain, describe(pooled, "m")) == {"pooling"}


def test_an_adapter_is_told_from_the_base(folder: str) -> None:
    torch.manual_seed(0)
    first, second = load(folder), load(folder)
    for embedder in (first, second):
        checkpoint.add_adapter(embedder.backbone, 2, 4, 0.0, None)
    assert "adapter" in changed(describe(first, "m"), describe(second, "m"))
    assert describe(load(folder), "m")["adapter"] == "none"


class Counted:
    """SHA-256 that counts the bytes it is given."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, data: bytes = b"") -> Counted:
        self.digest = hashlib.new("sha256", data)
        self.bytes += len(data)
        return self

    def update(self, data: bytes) -> None:
        self.digest.update(data)
        self.bytes += len(data)

    def hexdigest(self) -> str:
        return self.digest.hexdigest()


def test_weights_are_hashed_once_for_unchanged_files_and_again_for_changed_ones(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    age(copy, 100)

    def described(embedder: Embedder | None = None) -> tuple[dict[str, str], int]:
        embedder = embedder or load(str(copy))
        counted = Counted()
        monkeypatch.setattr(fingerprint.hashlib, "sha256", counted)
        found = describe(embedder, "m")
        monkeypatch.undo()
        monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path / "cache"))
        return found, counted.bytes

    size = sum(tensor.nbytes for tensor in load(str(copy)).state_dict().values())
    first, hashed = described()
    assert hashed > size
    again, hashed = described()
    assert again == first and hashed < size / 5

    embedder = load(str(copy))
    with torch.no_grad():
        next(embedder.parameters()).mul_(2)
    in_memory, hashed = described(embedder)
    assert changed(first, in_memory) == {"weights"} and hashed > size

    weights = copy / "model.safetensors"
    state = load_file(weights)
    save_file({name: tensor * 2 for name, tensor in state.items()}, weights, metadata={"format": "pt"})
    age(copy, 50)
    other, hashed = described()
    assert changed(first, other) == {"weights"} and hashed > size
    assert described(Embedder.from_pretrained(copy, dtype=torch.bfloat16))[1] > size / 2

    (tmp_path / "cache/fingerprints.json").write_text("{")
    assert described()[0] == other


def test_files_that_were_just_written_are_not_remembered(folder: str, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    age(copy, 0)
    assert load(str(copy)).origin is None


def age(folder: Path, seconds: float) -> None:
    """Sets the times of all files to so many seconds ago."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)
