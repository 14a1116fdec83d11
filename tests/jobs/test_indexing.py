"""Indexing a folder: only new inputs are encoded, and the store matches the folder."""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jobs.test_sources import write_pdf
from jobs.toys import ColourEncoder
from samples import COLORS, draw

from vlm2vec.errors import UserError
from vlm2vec.jobs import index_writer
from vlm2vec.jobs.classifying import Labels, classify_source, classify_store
from vlm2vec.jobs.duplicates import find_duplicates
from vlm2vec.jobs.index_writer import IndexReport
from vlm2vec.jobs.indexing import index_source, write_errors
from vlm2vec.jobs.searching import PRESETS, Query, Searcher, image_ref, with_images
from vlm2vec.jobs.sheet import write_sheet
from vlm2vec.jobs.sources import open_source
from vlm2vec.media.images import ImageRef
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import StoreFacts, VectorStore
from vlm2vec.types import EmbeddingInput

FACTS = StoreFacts("toy", "colours", 3)
NAMES = list(COLORS)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for i in range(12):
        draw(folder / NAMES[i % 4] / f"{i}.png", NAMES[i % 4], i)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> VectorStore:
    return open_store(f"{tmp_path}/photos.lance", FACTS)


def bring_up(store: VectorStore, folder: Path, encoder: ColourEncoder | None = None, **kwargs: bool) -> IndexReport:
    return index_source(encoder or ColourEncoder(), open_source(folder), store, **kwargs)


def rows_of(store: VectorStore) -> dict[str, dict[str, object]]:
    return {key: one for rows in store.scan() for key, one in zip(rows.keys, rows.metadata, strict=True)}


def test_a_second_run_encodes_only_what_is_new_or_changed_and_removes_what_is_gone(
    store: VectorStore, photos: Path
) -> None:
    report = bring_up(store, photos)
    assert (report.num_new, report.num_encoded, store.count()) == (12, 12, 12)
    assert report.index.kind == "exact"
    encoder = ColourEncoder()
    report = bring_up(store, photos, encoder)
    assert (report.num_same, report.num_new, encoder.num_encoded) == (12, 0, 0)
    draw(photos / "new.png", "red", 99)
    draw(photos / "red/0.png", "blue", 98)
    (photos / "green/1.png").unlink()
    report = bring_up(store, photos, encoder)
    assert (report.num_new, report.num_changed, report.num_removed, report.num_same) == (1, 1, 1, 10)
    assert encoder.num_encoded == 2
    on_disk = {str(path) for path in photos.rglob("*.png")}
    assert set(rows_of(store)) == on_disk
    fresh = open_store(f"{store.uri}.fresh.lance", FACTS)
    bring_up(fresh, photos)
    for key in on_disk:
        ours, theirs = (one.fetch([key], [], vectors=True).vectors_ND for one in (store, fresh))
        assert np.array_equal(ours, theirs)


def test_what_was_moved_copied_or_touched_is_not_encoded_again(store: VectorStore, photos: Path) -> None:
    bring_up(store, photos)
    (photos / "red/0.png").rename(photos / "moved.png")
    (photos / "copy.png").write_bytes((photos / "blue/2.png").read_bytes())
    os.utime(photos / "green/5.png", (1, 1))
    encoder = ColourEncoder()
    report = bring_up(store, photos, encoder)
    assert (report.num_new, report.num_changed, report.num_removed) == (2, 1, 1)
    assert encoder.num_encoded == report.num_encoded == 0
    assert store.count() == 13


def test_rows_know_their_file_and_its_size(store: VectorStore, photos: Path) -> None:
    bring_up(store, photos)
    row = rows_of(store)[str(photos / "red/0.png")]
    assert [row[f"v2v_{name}"] for name in ("width", "height", "kind", "modality")] == [40, 40, "image", "image"]
    assert image_ref(row) == ImageRef(path=str(photos / "red/0.png"))
    assert store.count("width = 40 AND kind = 'image'") == 12


def test_two_folders_share_a_store_and_each_removes_only_its_own(
    store: VectorStore, photos: Path, tmp_path: Path
) -> None:
    draw(tmp_path / "more/a.png", "red", 1)
    draw(tmp_path / "more/b.png", "blue", 1)
    bring_up(store, photos)
    bring_up(store, tmp_path / "more")
    (tmp_path / "more/a.png").unlink()
    report = bring_up(store, tmp_path / "more")
    assert (report.num_removed, store.count()) == (1, 13)


def test_a_job_that_dies_goes_on_where_it_was(
    store: VectorStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_writer, "PART", 3)
    dying = ColourEncoder(fail_after=6)
    with pytest.raises(KeyboardInterrupt):
        bring_up(store, photos, dying)
    assert store.count() == 6
    encoder = ColourEncoder()
    report = bring_up(store, photos, encoder)
    assert (report.num_same, encoder.num_encoded, store.count()) == (6, 6, 12)


def test_unreadable_files_are_listed_and_stop_nothing(store: VectorStore, photos: Path, tmp_path: Path) -> None:
    bring_up(store, photos)
    whole = (photos / "red/0.png").read_bytes()
    (photos / "red/0.png").write_bytes(whole[: len(whole) // 2])  # its head can be read, its pixels cannot
    (photos / "text.png").write_text("no picture")
    report = bring_up(store, photos)
    errors = tmp_path / "errors.jsonl"
    write_errors(report, errors)
    listed = [json.loads(line) for line in errors.read_text().splitlines()]
    assert {Path(one["key"]).name for one in listed} == {"0.png", "text.png"}
    assert all("not a readable image" in one["reason"] for one in listed)
    assert store.count() == 11, "a vector of content that is no more is removed"
    (photos / "red/0.png").write_bytes(whole)
    (photos / "text.png").unlink()
    report = bring_up(store, photos)
    write_errors(report, errors)
    assert store.count() == 12 and not errors.exists()


def test_a_key_that_appears_twice_is_reported_and_kept_once(store: VectorStore, tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "red"}, {"id": "a", "text": "blue"}, {"id": "b", "text": "green", "price": 3.5}]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = bring_up(store, table)
    assert store.count() == 2 and "twice" in report.errors[0][1]
    assert store.count("price > 3") == 1
    assert bring_up(store, table).num_encoded == 0


def test_search_by_text_by_image_by_both_and_by_a_row(store: VectorStore, photos: Path) -> None:
    bring_up(store, photos)
    searcher = Searcher(ColourEncoder(), store)
    red = ImageRef(path=str(photos / "red/0.png"))
    for query in (Query("red"), Query(image=red), Query("red", red, "retrieval")):
        assert {Path(hit.key).parent.name for hit in searcher.search(query, 3)} == {"red"}
    both = searcher.search(Query("green", red), 1)[0]
    assert Path(both.key).parent.name == "yellow", "red and green together are yellow"
    similar = searcher.similar(str(photos / "blue/2.png"), 2)
    assert {hit.key for hit in similar} == {str(photos / "blue/6.png"), str(photos / "blue/10.png")}
    assert searcher.search(Query("red"), 3, "path LIKE '%blue%'")[0].key.count("blue")
    assert Query("x", instruction="vqa").as_input().instruction == PRESETS["vqa"]
    assert Query("x", instruction="As I say").as_input().instruction == "As I say"
    with pytest.raises(UserError, match="the query is empty"):
        searcher.search(Query("  "))
    with pytest.raises(UserError, match="no row 'absent'"):
        searcher.similar("absent")


def test_kept_images_show_results_after_the_files_are_gone(store: VectorStore, photos: Path, tmp_path: Path) -> None:
    bring_up(store, photos, keep_images=True)
    hits = with_images(store, Searcher(ColourEncoder(), store).search(Query("red"), 2))
    for path in photos.rglob("*.png"):
        path.unlink()
    colour = np.asarray(image_ref(hits[0].metadata).load()).mean((0, 1))  # type: ignore[union-attr]
    assert colour[0] > 180 and colour[1] < 80
    write_sheet(tmp_path / "sheet.html", "red", [("", hits)])
    assert (tmp_path / "sheet.html").read_text().count("data:image/jpeg;base64,") == 2


def test_a_sheet_says_which_image_is_gone_and_escapes_what_it_shows(
    store: VectorStore, photos: Path, tmp_path: Path
) -> None:
    bring_up(store, photos)
    hits = Searcher(ColourEncoder(), store).search(Query("red"), 3)
    Path(hits[0].key).unlink()
    write_sheet(tmp_path / "sheet.html", "<b>red</b>", [("found", hits)], ImageRef(path=hits[1].key))
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "the image file is missing" in page
    assert "&lt;b&gt;red" in page and "<b>red" not in page


def test_duplicates_are_the_groups_of_all_pairs_above_the_threshold(
    store: VectorStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring_up(store, photos)
    monkeypatch.setattr("vlm2vec.retrieval.near_pairs.BLOCK", 5)
    groups = find_duplicates(store, 0.99)
    assert {frozenset(Path(hit.key).parent.name for hit in group.hits) for group in groups} == {
        frozenset({name}) for name in NAMES
    }
    assert all(len(group.hits) == 3 and group.hits[0].score == pytest.approx(1, abs=1e-5) for group in groups)
    assert find_duplicates(store, 0.99, "path LIKE '%blue/2.png'") == []
    assert len(find_duplicates(store, -1)[0].hits) == 12
    with pytest.raises(UserError, match="expected a cosine"):
        find_duplicates(store, 3)


def test_zero_shot_labels_of_a_folder_and_of_a_store_agree(store: VectorStore, photos: Path) -> None:
    encoder = ColourEncoder()
    bring_up(store, photos)
    labels = Labels(encoder, NAMES, "something {}")
    (photos / "bad.png").write_text("no picture")
    verdicts = list(classify_source(encoder, open_source(photos), labels))
    assert [one.key for one in verdicts] == [record.key for record in open_source(photos)]
    of_folder = {str(photos / one.key): one for one in verdicts}
    of_store = {one.key: one for one in classify_store(store, labels)}
    bad = of_folder.pop(str(photos / "bad.png"))
    assert bad.label is None and "not a readable image" in str(bad.error)
    assert of_folder.keys() == of_store.keys()
    for key, verdict in of_store.items():
        assert verdict.label == of_folder[key].label == Path(key).parent.name
        assert verdict.score == pytest.approx(of_folder[key].score, abs=1e-5) and verdict.margin > 0
    for names, template in ((["cat"], "{}"), (["cat", "cat"], "{}"), (["cat", "dog"], "a photo")):
        with pytest.raises(UserError, match="expected"):
            Labels(encoder, names, template)


def test_images_inside_a_parquet_are_kept_so_that_results_can_be_shown(store: VectorStore, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw(tmp_path / "red.png", "red", 1)
    cells = [{"image": {"bytes": (tmp_path / "red.png").read_bytes(), "path": "red.png"}, "name": "a"}]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "rows.parquet")
    bring_up(store, tmp_path / "rows.parquet")
    hit = with_images(store, Searcher(ColourEncoder(), store).search(Query("red"), 1))[0]
    assert image_ref(hit.metadata).load().size == (40, 40)  # type: ignore[union-attr]


def test_a_second_run_lists_the_folder_and_opens_the_changed_files_alone(
    store: VectorStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pdf(photos / "doc.pdf", ["red", "blue"])
    for name in ("a.txt", "b.md"):
        (photos / name).write_text("red")
    bring_up(store, photos)
    draw(photos / "red/0.png", "blue", 98)
    (photos / "a.txt").write_text("blue")
    opened: list[str] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or real(path))
    monkeypatch.setattr("vlm2vec.media.documents.Pdf", None)
    report = bring_up(store, photos)
    assert sorted(opened) == ["0.png", "a.txt"], "each is read once, digest and vector together"
    assert (report.num_same, report.num_changed, report.num_encoded) == (14, 2, 2)


def test_pages_that_a_kill_left_out_are_encoded_by_the_next_run(store: VectorStore, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_pdf(tmp_path / "in/doc.pdf", ["red", "blue", "red"])
    bring_up(store, tmp_path / "in")
    store.delete([f"{tmp_path}/in/doc.pdf#page-2"])
    encoder = ColourEncoder()
    report = bring_up(store, tmp_path / "in", encoder)
    assert (report.num_same, report.num_new, report.num_encoded, store.count()) == (2, 1, 1, 3)


def test_a_part_is_appended_without_a_join_and_changed_rows_alone_are_merged(
    store: VectorStore, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: list[int] = []
    real = type(store).upsert
    monkeypatch.setattr(
        type(store), "upsert", lambda self, keys, *rest: merged.append(len(keys)) or real(self, keys, *rest)
    )
    bring_up(store, photos)
    assert merged == []
    draw(photos / "red/0.png", "blue", 98)
    draw(photos / "new.png", "blue", 99)
    bring_up(store, photos)
    assert merged == [1] and store.count() == 13


def test_the_path_of_a_table_is_resolved_once_and_its_folder_looked_up_once_however_many_rows_it_has(
    store: VectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(f'{{"id": {i}, "text": "red {i}"}}\n' for i in range(300)))
    calls: list[str] = []
    for name in ("realpath", "lexists"):
        real = getattr(os.path, name)
        monkeypatch.setattr(
            os.path, name, lambda *args, _real=real, **kw: calls.append(str(args[0])) or _real(*args, **kw)
        )
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **kw: calls.append(str(args[0])) or stat(*args, **kw))
    assert bring_up(store, table).num_new == 300
    assert sum("rows.jsonl" in call for call in calls) < 20


def test_new_rows_take_one_commit_a_part_and_no_look_at_the_store_and_inputs_are_held_until_they_are_encoded(
    store: VectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FIRST_PART", 8), ("PART", 64), ("ENCODED_AT_ONCE", 16)):
        monkeypatch.setattr(index_writer, name, value)
    calls: Counter[str] = Counter()
    for name in ("add", "upsert", "scan", "fetch", "delete"):
        real = getattr(type(store), name)
        monkeypatch.setattr(
            type(store), name, lambda self, *args, _n=name, _r=real, **kw: calls.update([_n]) or _r(self, *args, **kw)
        )
    held: list[int] = []

    class Counting(ColourEncoder):
        def encode_document(self, inputs: Sequence[EmbeddingInput], **kwargs: object) -> np.ndarray:
            held.append(sum(isinstance(one, EmbeddingInput) for one in gc.get_objects()))
            return super().encode(inputs, **kwargs)

    table = tmp_path / "rows.jsonl"
    table.write_text("".join(f'{{"id": {i}, "text": "red {i}"}}\n' for i in range(264)))
    report = bring_up(store, table, Counting())
    assert (report.num_new, len(held)) == (264, 1 + 256 // 16)
    assert calls == {"add": 1 + 256 // 64, "scan": 1, "delete": 1}
    assert max(held) - held[0] <= 16


def test_documents_are_encoded_with_the_instruction_that_the_store_records(photos: Path, tmp_path: Path) -> None:
    given: list[object] = []

    class Told(ColourEncoder):
        def encode_document(self, inputs: Sequence[EmbeddingInput], **kwargs: object) -> np.ndarray:
            given.append(kwargs.get("instruction"))
            return super().encode(inputs, **kwargs)

    for name, instruction in (("with", "Find the colour."), ("without", None)):
        facts = replace(FACTS, instruction=instruction)
        index_source(Told(), open_source(photos), open_store(f"{tmp_path}/{name}.lance", facts))
    assert given == ["Find the colour.", None]
