"""Moved or deleted sources: their rows are marked, removed or given their new paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs.test_search_cli import SMALL, refused, typed
from jobs.test_sources import write_pdf, write_video
from jobs.toys import ColourEncoder
from samples import draw

from vlm2vec.errors import UserError
from vlm2vec.jobs.indexing import index_source
from vlm2vec.jobs.moving import forget, relocate
from vlm2vec.jobs.searching import is_missing
from vlm2vec.jobs.sources import open_source
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import StoreFacts, VectorStore

FACTS = StoreFacts("toy", "colours", 3)
pytestmark = pytest.mark.filterwarnings("ignore:Local mode")


class Tall(ColourEncoder):
    """Also sees videos: as red."""

    def _vector(self, item):  # type: ignore[no-untyped-def]
        return super()._vector(item) if item.video is None else self._vector(type(item)("red"))


@pytest.fixture(params=["{folder}/s.lance", "qdrant://{folder}/q/s"], ids=["lance", "qdrant"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> VectorStore:
    for name in ("old/a.png", "old/deep/b.png", "older/c.png"):
        draw(tmp_path / name, "red", len(name))
    write_pdf(tmp_path / "old/doc.pdf", ["red", "blue"])
    write_video(tmp_path / "old/film.mp4", 1)
    store = open_store(request.param.format(folder=tmp_path), FACTS)
    for name in ("old", "older"):
        index_source(Tall(), open_source(tmp_path / name), store)
    assert store.count() == 6
    return store


def keys(store: VectorStore) -> list[str]:
    return sorted(key for rows in store.scan([]) for key in rows.keys)


def test_forget_removes_the_rows_of_a_source_or_of_a_folder_below_it_and_of_no_other(
    store: VectorStore, tmp_path: Path
) -> None:
    assert forget(store, str(tmp_path / "old/deep")) == 1
    assert forget(store, f"{tmp_path}/old/doc.pdf") == 2
    (tmp_path / "old").rename(tmp_path / "gone")
    assert forget(store, f"{tmp_path}/old/") == 2
    assert keys(store) == [f"{tmp_path}/older/c.png"]
    with pytest.raises(UserError, match=r"old: .* has no rows of it; its sources are: .*older \(1 rows\)"):
        forget(store, f"{tmp_path}/old")


def test_relocate_makes_the_store_what_an_index_of_the_new_place_makes_and_encodes_nothing(
    store: VectorStore, tmp_path: Path
) -> None:
    before = store.fetch(keys(store), vectors=True)
    (tmp_path / "old").rename(tmp_path / "new")
    assert sum(map(is_missing, before.metadata)) == 5
    assert relocate(store, f"{tmp_path}/old", f"{tmp_path}/new") == 5
    encoder = Tall()
    report = index_source(encoder, open_source(tmp_path / "new"), store)
    assert (report.num_same, report.num_new, report.num_removed, encoder.num_encoded) == (5, 0, 0, 0)
    after = store.fetch([key.replace("/old/", "/new/") for key in before.keys], vectors=True)
    assert len(after.keys) == store.count() == 6 and (after.vectors_ND == before.vectors_ND).all()
    assert not any(map(is_missing, after.metadata)) and report.gone == {}
    with pytest.raises(UserError, match="has no rows of it"):
        relocate(store, f"{tmp_path}/old", f"{tmp_path}/new")


def test_a_folder_that_was_moved_is_recognised_by_content_and_its_earlier_rows_are_named(
    store: VectorStore, tmp_path: Path
) -> None:
    (tmp_path / "old").rename(tmp_path / "new")
    encoder = Tall()
    report = index_source(encoder, open_source(tmp_path / "new"), store)
    assert (report.num_new, report.num_encoded, encoder.num_encoded) == (5, 0, 0)
    assert report.gone == {f"{tmp_path}/old": 5}


def test_the_commands_mark_forget_and_relocate(tmp_path: Path) -> None:
    store = tmp_path / "my photos.lance"
    draw(tmp_path / "old/a.png", "red", 0)
    typed("index", "compact", tmp_path / "old", "--store", store, *SMALL)
    (tmp_path / "old").rename(tmp_path / "new")
    assert "(file not found)" in typed("search", "red", "--store", store).replace("\n", "")
    assert json.loads(typed("search", "red", "--store", store, "--json"))[0]["missing"] is True
    said = refused("index", "compact", tmp_path / "old", "--store", store, *SMALL)
    assert "no such file or folder" in said and f"vlm2vec forget '{store}' {tmp_path}/old" in said
    assert "1 rows moved" in typed("relocate", store, tmp_path / "old", tmp_path / "new")
    assert "missing" not in typed("search", "red", "--store", store, "--json")
    assert "no such file or folder" in refused("relocate", store, tmp_path / "new", tmp_path / "absent")
    assert "1 rows removed" in typed("forget", store, tmp_path / "new")


def test_no_path_and_the_same_path_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "p/a.png", "red", 0)
    store = open_store(f"{tmp_path}/s.lance", StoreFacts("toy", "colours", 3))
    index_source(ColourEncoder(), open_source(tmp_path / "p"), store)
    for empty in ("", " "):  # as from a variable that is not set
        with pytest.raises(UserError, match="the path of the source is empty"):
            forget(store, empty)
    with pytest.raises(UserError, match="has no rows of it"):
        forget(store, "/")
    with pytest.raises(UserError, match="the old and the new path are the same"):
        relocate(store, "p/", "./p")
    assert store.count() == 1
