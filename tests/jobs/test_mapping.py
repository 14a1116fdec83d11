"""The map of a store: what is near stays near, every row is a point, and the page stands alone."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import draw
from typer.testing import CliRunner

from vlm2vec import UserError
from vlm2vec.cli import app
from vlm2vec.jobs import mapping
from vlm2vec.jobs.mapping import by_field, cluster, layout, write_map
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import StoreFacts, VectorStore

COLORS = ("red", "green", "blue")


def three_blobs(count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [3 · count, 8] around three directions, and the direction of each."""
    random = np.random.default_rng(0)
    of_N = np.repeat(np.arange(3), count)
    vectors = np.eye(8, dtype=np.float32)[of_N] + 0.05 * random.normal(size=(len(of_N), 8)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), of_N


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> VectorStore:
    folder = tmp_path_factory.mktemp("map")
    vectors_ND, of_N = three_blobs(4)
    names = [f"{COLORS[group]} {i} <b>" for i, group in enumerate(of_N)]
    paths = [folder / f"{COLORS[group]}_{i}.png" for i, group in enumerate(of_N)]
    for i, (path, group) in enumerate(zip(paths, of_N, strict=True)):
        draw(path, COLORS[group], i)
    about = [
        {"name": name, "hue": COLORS[group], "size": 10 * i, "v2v_path": str(path), "v2v_modality": "image"}
        for i, (name, group, path) in enumerate(zip(names, of_N, paths, strict=True))
    ]
    opened = open_store(str(folder / "m.lance"), create=StoreFacts(model="toy", fingerprint="f", dim=8))
    opened.upsert([f"{i:02}" for i in range(len(names))], vectors_ND, about)
    return opened


def read(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_neighbors_on_the_map_are_of_the_same_direction() -> None:
    vectors_ND, of_N = three_blobs()
    places = layout(vectors_ND)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1) + 9 * np.eye(len(places))
    assert (of_N[distances.argmin(axis=1)] == of_N).all()
    assert places.min() == 0 and places.max() == 1
    np.testing.assert_array_equal(places, layout(vectors_ND))


def test_clusters_are_named_by_size() -> None:
    vectors_ND, _ = three_blobs(32)
    groups = cluster(vectors_ND[:80])  # 32, 32 and 16 rows
    assert np.bincount(groups.of_N).tolist() == [32, 32, 16] and groups.names == ["cluster 1", "cluster 2", "cluster 3"]


def test_every_row_is_a_point_with_its_thumbnail_and_a_relative_link(store: VectorStore, tmp_path: Path) -> None:
    assert write_map(tmp_path / "map.html", store, color="hue") == 12
    data = read(tmp_path / "map.html")
    assert sorted(data["groups"]) == ["blue (4)", "green (4)", "red (4)"]
    for point in data["points"]:
        assert data["groups"][point["g"]].startswith(point["n"].split()[0])
        assert base64.b64decode(point["i"])[8:12] == b"WEBP"
        assert not point["f"].startswith("/") and (tmp_path / point["f"]).is_file()
    page = (tmp_path / "map.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and "<b>" not in page


def test_a_number_is_colored_by_ranges_and_unknown_values_are_named() -> None:
    groups = by_field("size", [{"size": i} for i in range(60)], "s.lance")
    assert len(groups.names) == mapping.NUM_BINS and np.bincount(groups.of_N).tolist() == [10] * 6
    groups = by_field("size", [{"size": i} for i in range(60)] + [{}], "s.lance")
    assert groups.names[-1] == "unknown" and groups.of_N[-1] == mapping.NUM_BINS


def test_rare_values_share_a_color() -> None:
    groups = by_field("tag", [{"tag": f"t{i}"} for i in range(30) for _ in range(30 - i)], "s.lance")
    assert len(groups.names) == mapping.MOST_GROUPS + 1 and groups.names[-1] == "others"


def test_a_limit_spreads_the_rows(store: VectorStore, tmp_path: Path) -> None:
    assert write_map(tmp_path / "map.html", store, limit=4) == 4
    assert [point["n"].split()[1] for point in read(tmp_path / "map.html")["points"]] == ["0", "3", "6", "9"]


def test_what_cannot_be_drawn_is_one_line(store: VectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no row has a field year; fields: hue, modality, name, path, size"):
        write_map(tmp_path / "map.html", store, color="year")
    with pytest.raises(UserError, match="3 rows: expected at least 4"):
        write_map(tmp_path / "map.html", store, where="size < 30")
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(UserError, match=r"pip install 'vlm2vec\[map\]'"):
        write_map(tmp_path / "map.html", store)
    assert not (tmp_path / "map.html").exists()


def test_the_command_draws_a_store(store: VectorStore, tmp_path: Path) -> None:
    arguments = ["map", store.uri, "-o", str(tmp_path / "map.html"), "--color", "hue", "--where", "size >= 40"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "map.html, 8 rows" in done.stdout.replace("\n", "")
