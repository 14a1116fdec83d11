"""The sample photographs: shipped, credited, and usable as the first images of every command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

import vlm2vec
from vlm2vec.cli import run
from vlm2vec.media.samples import CREDITS


def test_every_sample_photograph_is_small_readable_and_credited() -> None:
    paths = vlm2vec.sample_photographs()
    credited = re.findall(r"^\| (\S+\.jpg) \| .+ \| .+ \|$", CREDITS.read_text(), re.MULTILINE)
    assert [path.name for path in paths] == credited and len(paths) == 12
    for path in paths:
        with Image.open(path) as image:
            assert max(image.size) == 320
        assert path.stat().st_size < 30_000


def test_data_sample_copies_them_into_a_new_folder_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    assert run(["data", "sample", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"12 photographs: {folder}" in said and f"Next: vlm2vec index {folder} --store photos.lance" in said
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in vlm2vec.sample_photographs()]
    assert run(["data", "sample", str(folder)]) == 2
    assert "not an empty folder; choose another name" in capsys.readouterr().err


def test_the_public_names_are_visible_before_torch_is_imported() -> None:
    assert set(vlm2vec.__all__) <= set(dir(vlm2vec))
