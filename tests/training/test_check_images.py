"""The check of images before the first step: what it opens, what it finds and what it remembers."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.media.wholeness import MAX_FILES, CheckedImages, check_ends
from vlm2vec.training import check_images
from vlm2vec.training.check_images import read_images

MODEL: Any = SimpleNamespace(backbone=SimpleNamespace(vision_cache=None))  # of a model without a cache of features
FORMATS = {"jpg": {}, "png": {}, "webp": {}, "gif": {}, "bmp": {}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the images that were decoded."""
    found: list[str] = []
    load = ImageRef.load
    monkeypatch.setattr(ImageRef, "load", lambda image: found.append(str(image.path)) or load(image))
    return found


def photo(folder: Path, name: str, seed: int = 0) -> ImageRef:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), np.uint8)
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / name)
    return ImageRef(path=str(folder / name))


def check(images: list[ImageRef], **settings: bool) -> dict[ImageRef, UserError]:
    return read_images(MODEL, images, lambda done: None, **settings)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_truncated_file_of_any_format_is_found_wherever_it_is_cut(tmp_path: Path, ending: str) -> None:
    image = photo(tmp_path, f"photo.{ending}")
    check_ends(image)
    content = image.read()
    for share in (0.0, 0.1, 0.5, 0.9, 0.995):
        Path(str(image.path)).write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UserError, match=r"photo\."):
            check_ends(image)


def test_whole_photographs_and_pages_are_not_decoded(tmp_path: Path, decoded: list[str]) -> None:
    images = [photo(tmp_path, f"{i}.{ending}", i) for i, ending in enumerate(("jpg", "png", "webp"))]
    trailing = photo(tmp_path, "trailing.jpg")
    with Path(str(trailing.path)).open("ab") as file:
        file.write(b"\0\0\0")
    assert not check([*images, trailing]) and decoded == []
    assert not check(images, decode=True)
    assert len(decoded) == 3  # the whole decode does not trust the check of the ends


def test_a_second_run_opens_new_and_changed_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[ImageRef] = []
    first_error = check_images.first_error
    monkeypatch.setattr(
        check_images, "first_error", lambda image, decode: opened.append(image) or first_error(image, decode)
    )
    images = [photo(tmp_path / "photos", f"{i}.jpg", i) for i in range(50)]
    check([*images, *images])
    assert len(opened) == 50  # each once
    os.utime(str(images[7].path), ns=(1, 1))
    new = photo(tmp_path / "photos", "new.jpg")
    opened.clear()
    check([*images, new])
    assert opened == [images[7], new]


def test_bad_images_are_collected_or_the_first_one_raises_and_none_is_remembered(tmp_path: Path) -> None:
    images = [photo(tmp_path, f"{i}.jpg", i) for i in range(5)]
    images.append(ImageRef(path=str(tmp_path / "gone.jpg"), origin="row 5"))
    Path(str(images[3].path)).write_bytes(b"no image")
    for _ in range(2):
        assert set(check(images, skip=True)) == {images[3], images[5]}
        with pytest.raises(UserError, match=r"3\.jpg: not a readable image"):
            check(images)


def test_ranks_share_the_images_and_all_learn_of_the_bad_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [photo(tmp_path, f"{i}.jpg", i) for i in range(40)]
    Path(str(images[3].path)).write_bytes(b"no image")
    opened: list[ImageRef] = []
    first_error = check_images.first_error
    monkeypatch.setattr(
        check_images, "first_error", lambda image, decode: opened.append(image) or first_error(image, decode)
    )
    shares, found = [], []
    for rank in range(3):
        monkeypatch.setattr(check_images, "world_size", lambda: 3)
        monkeypatch.setattr(check_images, "rank", lambda rank=rank: rank)
        monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path / f"cache-{rank}"))
        found.append(check(images, skip=True))
        shares.append(set(opened))
        opened.clear()
    assert set().union(*shares) == set(images) and sum(map(len, shares)) == 40
    assert max(map(len, shares)) < 30
    assert [set(bad) for bad in found if bad] == [{images[3]}]


def test_remembered_images_of_many_runs_are_merged_into_one_file(tmp_path: Path) -> None:
    for number in range(MAX_FILES + 1):
        CheckedImages(tmp_path, "header").add([number + 1])
    merged = CheckedImages(tmp_path, "header")
    assert len(list(tmp_path.glob("header-*.npy"))) == 1
    assert merged.known(np.arange(MAX_FILES + 3, dtype=np.uint64)).tolist() == [False, *[True] * (MAX_FILES + 1), False]
    (tmp_path / "header-damaged.npy").write_bytes(b"no array")
    assert CheckedImages(tmp_path, "header").known(np.array([1], np.uint64)).all()
