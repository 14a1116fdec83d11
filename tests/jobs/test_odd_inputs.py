"""Unusual content of users' folders and tables: names, values, formats, linked and unreadable folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs.test_search_cli import typed
from jobs.toys import ColourEncoder
from PIL import Image, features
from samples import COLORS, draw

from vlm2vec.errors import UserError
from vlm2vec.jobs.embed import EmbedSettings, Job
from vlm2vec.jobs.indexing import index_source
from vlm2vec.jobs.records import SourceSettings
from vlm2vec.jobs.searching import Query, Searcher, image_ref, is_missing
from vlm2vec.jobs.sources import open_source
from vlm2vec.media.images import IMAGE_ENDINGS, ImageRef
from vlm2vec.media.text import actual_path, printable
from vlm2vec.retrieval.metadata import PREFIX, column_name, plain_value
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import StoreFacts

FACTS = StoreFacts("toy", "colours", 3)
BOTH = ["{folder}/s.lance", "qdrant://{folder}/q/s"]
UNDECODABLE = os.fsdecode(b"caf\xe9.png")
JSON = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6)
TAKEN = ["source", "path", "row", "version", "width", "kind", "digest", "modality", "page", "v2v_path", "vector", "a.b"]
pytestmark = pytest.mark.filterwarnings("ignore:Local mode")


def rows_of(uri: str) -> dict[str, dict[str, Any]]:
    store = open_store(uri)
    return {key: one for rows in store.scan() for key, one in zip(rows.keys, rows.metadata, strict=True)}


@pytest.mark.parametrize("address", BOTH, ids=["lance", "qdrant"])
def test_columns_named_like_fields_of_this_package_keep_their_values_and_answer_filters(
    tmp_path: Path, address: str
) -> None:
    draw(tmp_path / "a.png", "red", 0)
    own = {"source": "web", "width": 12.5, "kind": "mug", "version": "2024", "path": "shelf 3", "row": 7, "text": "red"}
    (tmp_path / "items.jsonl").write_text(json.dumps({"key": "k1", "image": "a.png", "page no.": 3, **own}) + "\n")
    store, source = open_store(address.format(folder=tmp_path), FACTS), open_source(tmp_path / "items.jsonl")
    index_source(ColourEncoder(), source, store)
    for where in ("source = 'web'", "width = 12.5", "`page no.` = 3", "v2v_width = 40", "modality = 'both'"):
        (hit,) = Searcher(ColourEncoder(), store).search(Query("red"), 5, where)
        assert own.items() - {("text", "red")} <= hit.metadata.items()
    assert source.renamed == {"page no.": column_name("page no.")}
    assert hit.metadata[f"{PREFIX}width"] == 40 and hit.metadata[f"{PREFIX}row"] == 1


@settings(max_examples=12)
@given(rows=st.lists(st.dictionaries(st.sampled_from(TAKEN) | st.text(max_size=6), JSON, max_size=5), min_size=1))
def test_a_table_of_any_columns_and_values_is_indexed_with_every_value(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("table")
    used = {"id", "caption", "instruction"}
    rows = [{name: value for name, value in row.items() if name not in used} for row in rows]
    lines = [json.dumps({**row, "id": f"r{i}", "caption": "red"}) for i, row in enumerate(rows)]
    (folder / "t.jsonl").write_text("\n".join(lines))
    columns = SourceSettings(text_column="caption", image_column=None, key_column="id")
    source = open_source(folder / "t.jsonl", columns)
    if any({"image", "images", "path", "picture"} & row.keys() for row in rows):
        return  # these are images by name
    report = index_source(ColourEncoder(), source, open_store(f"{folder}/s.lance", FACTS))
    assert report.errors == [] and report.num_new == len(rows)
    found = rows_of(f"{folder}/s.lance")
    for i, row in enumerate(rows):
        kept = found[f"{folder}/t.jsonl#r{i}"]
        for name, value in row.items():
            value = plain_value(value)
            assert kept.get(column_name(name)) in (value, str(value), json.dumps(value)) or isinstance(value, float)


@pytest.mark.parametrize("odd", [3, 590])
def test_one_word_in_a_column_of_numbers_makes_it_text_wherever_it_stands(tmp_path: Path, odd: int) -> None:
    rows = [{"text": "red", "n": "n/a" if i == odd else i / 2} for i in range(600)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = index_source(ColourEncoder(), open_source(tmp_path / "t.jsonl"), open_store(f"{tmp_path}/s.lance", FACTS))
    assert report.num_new == 600 and report.errors == []
    kept = rows_of(f"{tmp_path}/s.lance")
    assert [kept[f"{tmp_path}/t.jsonl#{i}"]["n"] for i in (1, 2, 3 if odd > 3 else 5)] == [
        "0",
        "0.5",
        "1" if odd > 3 else "2",
    ]
    assert kept[f"{tmp_path}/t.jsonl#{odd + 1}"]["n"] == "n/a"


@pytest.mark.parametrize("address", BOTH, ids=["lance", "qdrant"])
def test_a_file_name_that_is_not_utf_8_is_indexed_found_and_opened(tmp_path: Path, address: str) -> None:
    for name, color in (("good.png", "red"), (UNDECODABLE, "blue")):
        draw(tmp_path / "p" / name, color, 0)
    store = open_store(address.format(folder=tmp_path), FACTS)
    assert index_source(ColourEncoder(), open_source(tmp_path / "p"), store).num_new == 2
    (hit,) = Searcher(ColourEncoder(), store).search(Query("blue"), 1)
    assert hit.key == f"{tmp_path}/p/caf\\xe9.png" and not is_missing(hit.metadata)
    assert image_ref(hit.metadata).load().size == (40, 40)  # type: ignore[union-attr]
    assert index_source(ColourEncoder(), open_source(tmp_path / "p"), store).num_same == 2


def test_files_of_vectors_hold_names_that_are_not_utf_8(tmp_path: Path) -> None:
    for name in ("good.png", UNDECODABLE):
        draw(tmp_path / "p" / name, "red", 0)
    for ending in (".npy", ".parquet", ".lance"):
        job = Job(open_source(tmp_path / "p"), tmp_path / f"v{ending}", EmbedSettings(), FACTS)
        job.run(ColourEncoder())
        assert job.finish().num_vectors == 2


@given(st.binary(min_size=1, max_size=20).filter(lambda name: b"/" not in name and b"\0" not in name))
def test_a_path_survives_the_text_that_is_kept_of_it(name: bytes) -> None:
    path = os.fsdecode(name)
    assert printable(path).encode()
    assert actual_path(printable(path)) == path or "\\x" in path


def test_half_a_character_is_kept_escaped_in_metadata_and_refused_as_input(tmp_path: Path) -> None:
    lines = ['{"text": "red", "note": "cut \\ud83d"}', '{"text": "red \\ud83d"}', '{"text": "red", "\\ud83d": 1}']
    lines += ['{"image": "\\udc00.png"}', '{"image": "a\\u0000.png"}']
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    report = index_source(ColourEncoder(), open_source(tmp_path / "m.jsonl"), open_store(f"{tmp_path}/s.lance", FACTS))
    assert report.num_new == 2
    assert rows_of(f"{tmp_path}/s.lance")[f"{tmp_path}/m.jsonl#1"]["note"] == "cut \\ud83d"
    (_, reason), *paths = report.errors
    assert ["the image file is missing" in one for _, one in paths] == [True, True]
    assert "row 2: column text: character 5 is a lone surrogate (U+D83D" in reason


@pytest.mark.parametrize("name", ["my photos", "写真", "a[1]", "it's", "a#b?c%20", "ünï", "plain-1.2_x"])
def test_a_store_may_have_any_name_that_a_folder_may_have(tmp_path: Path, name: str) -> None:
    uri = f"{tmp_path}/{name}.lance"
    draw(tmp_path / "p/a.png", "red", 0)
    with pytest.raises(UserError, match="no such store"):
        open_store(uri)
    index_source(ColourEncoder(), open_source(tmp_path / "p"), open_store(uri, FACTS))
    assert open_store(uri).count() == 1 and Path(uri).is_dir()
    assert index_source(ColourEncoder(), open_source(tmp_path / "p"), open_store(uri, FACTS)).num_same == 1


@pytest.mark.parametrize("name", ["new\nline", "tab\t", "a\0b", "\udce9", ".", ""])
def test_a_name_that_no_store_can_have_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="expected a name") as caught:
        open_store(f"{tmp_path}/{name}.lance", FACTS)
    assert "\n" not in str(caught.value)


def test_a_store_is_renamed_like_a_folder_or_says_which_names_work(tmp_path: Path) -> None:
    draw(tmp_path / "p/a.png", "red", 0)
    for name in ("my photos", "photos"):
        index_source(ColourEncoder(), open_source(tmp_path / "p"), open_store(f"{tmp_path}/{name}.lance", FACTS))
    (tmp_path / "my photos.lance").rename(tmp_path / "renamed.lance")
    assert open_store(f"{tmp_path}/renamed.lance").count() == 1
    (tmp_path / "photos.lance").rename(tmp_path / "my photos.lance")
    with pytest.raises(UserError, match=r"created under another name.*; rename the folder: letters, digits"):
        open_store(f"{tmp_path}/my photos.lance")


@pytest.mark.parametrize("ending", [".avif", ".jp2", ".jfif", ".mpo", ".heic", ".tga", ".JPE"])
def test_an_image_of_every_listed_format_is_read(tmp_path: Path, ending: str) -> None:
    needs = {".avif": "avif", ".jp2": "jpg_2000"}.get(ending)
    if needs and not features.check(needs):
        pytest.skip(f"this Pillow was built without {needs}")
    if ending == ".heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    written = {".jfif": "JPEG", ".JPE": "JPEG", ".heic": "HEIF"}.get(ending)
    Image.new("RGB", (64, 48), COLORS["red"]).save(tmp_path / f"a{ending}", format=written)
    assert ending.lower() in IMAGE_ENDINGS
    store = open_store(f"{tmp_path}/s.lance", FACTS)
    assert index_source(ColourEncoder(), open_source(tmp_path), store).num_new == 1
    (row,) = rows_of(f"{tmp_path}/s.lance").values()
    assert (row["v2v_width"], row["v2v_height"]) == (64, 48)
    assert Searcher(ColourEncoder(), store).search(Query("red"), 1)[0].score > 0.98


def test_heic_without_its_library_is_an_error_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(UserError, match=r"IMG_1.HEIC: .*pip install 'vlm2vec\[heic\]'"):
        ImageRef(path=str(tmp_path / "IMG_1.HEIC")).load()


def test_index_and_embed_say_which_files_and_folders_they_skipped(tmp_path: Path) -> None:
    draw(tmp_path / "p/a.png", "red", 0)
    for name in ("b.xyz", "c.xyz", "d.csv", "e"):
        (tmp_path / "p" / name).write_text("x")
    (tmp_path / "q").mkdir()
    (tmp_path / "p/linked").symlink_to("../q")
    small = ["--option", "num_layers=1", "--option", "visual_tokens=4", "--option", "image_size=64"]
    for command in (["index", "--store", tmp_path / "s.lance"], ["embed", "-o", tmp_path / "v.npy"]):
        said = typed(command[0], "compact", tmp_path / "p", *command[1:], *small)
        assert "Skipped 4 files of other types: 2 .xyz, 1 without an ending, 1 .csv." in said
        assert f"Skipped 1 linked folder, as links are not followed: {tmp_path}/p/linked." in said
