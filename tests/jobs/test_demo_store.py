"""The demo of the search page: generated images in a store in the user cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vlm2vec.jobs import demo_store as demo
from vlm2vec.jobs.searching import Searcher
from vlm2vec.models.embedder import Embedder


def test_the_images_are_what_their_names_say(tmp_path: Path) -> None:
    assert demo.draw_images(tmp_path / "images") == tmp_path / "images/images.jsonl"
    files = sorted((tmp_path / "images").glob("*.png"))
    assert len(files) == demo.num_images() == 172
    for name in ("red-star", "blue-heart", "black-moon", "green-cross"):
        colour = demo.COLOURS[name.split("-")[0]]
        image = Image.open(tmp_path / f"images/{name}.png")
        pixels = list(image.getdata()) if not hasattr(image, "get_flattened_data") else image.get_flattened_data()
        assert 0.04 < sum(pixel == colour for pixel in pixels) / len(pixels) < 0.5


def test_a_second_start_encodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder, done = Embedder.from_pretrained("compact", num_layers=1, visual_tokens=4, image_size=64), []
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "NUM_PAIRS", 8)
    monkeypatch.setattr(demo, "NUM_COUNTS", 8)
    store = demo.demo_store(embedder, "compact", done.append)
    assert store.count() == sum(done) == demo.num_images()
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.lance/data/*"))
    again = demo.demo_store(embedder, "compact")
    assert again.count() == store.count() and again.uri == store.uri
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.lance/data/*")) == before
    (row,) = (rows for rows in store.scan(["name"], "name = 'red star'"))
    assert len(Searcher(embedder, store).similar(row.keys[0], 5, "shape = 'star' AND count = 1")) == 5
