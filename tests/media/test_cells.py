"""Text and image cells of any Arrow type are the same to every reader of parquet."""

from __future__ import annotations

import datetime
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm2vec.data.pairs import read_pairs
from vlm2vec.data.records import read_eval_records, read_train_records
from vlm2vec.errors import UserError
from vlm2vec.jobs.sources import open_source
from vlm2vec.media import archives
from vlm2vec.media.cells import cell_kind
from vlm2vec.media.images import ImageRef

HUB = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LARGE_HUB = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
IMAGES = [pa.binary(), pa.large_binary(), pa.binary_view(), HUB, LARGE_HUB, pa.struct([("path", pa.string())])]
LISTS = [pa.list_(HUB), pa.large_list(HUB), pa.list_(pa.binary())]
NUMBER = 3


def png(number: int) -> bytes:
    output = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 40, 0, 0)).save(output, "PNG")
    return output.getvalue()


def cell(kind: pa.DataType, number: int | None) -> Any:
    """The cell of an image; None: an empty one."""
    if pa.types.is_struct(kind):
        if kind.num_fields == 1:
            return {"path": None if number is None else f"{number}.png"}
        return {"bytes": None if number is None else png(number), "path": None}
    return None if number is None else png(number)


def written(folder: Path, texts: pa.Array, images: pa.Array, name: str = "image") -> Path:
    for number in range(NUMBER):
        (folder / f"{number}.png").write_bytes(png(number))
    number_of_rows = len(texts)
    table = pa.table({"query_text": texts, f"query_{name}": images, "target_text": ["t"] * number_of_rows})
    pq.write_table(table, folder / "a.parquet", row_group_size=2)
    own = pa.table({"text": texts, name: images})
    pq.write_table(own, folder / "b.parquet", row_group_size=2)
    return folder


def contents(images: Any) -> list[bytes]:
    return [image.read() for image in images]


@settings(max_examples=40)
@given(
    text=st.sampled_from(TEXTS),
    image=st.sampled_from(IMAGES),
    rows=st.lists(st.sampled_from([0, 1, 2, None]), min_size=1, max_size=5),
)
def test_every_reader_gets_the_texts_and_images_of_every_type(
    tmp_path: Path, text: pa.DataType, image: pa.DataType, rows: list[int | None]
) -> None:
    words = [f"text {i} é" for i in range(len(rows))]
    column = pa.array(words).cast(text) if pa.types.is_dictionary(text) else pa.array(words, text)
    written(tmp_path, column, pa.array([cell(image, number) for number in rows], image))
    wanted = [[] if number is None else [png(number)] for number in rows]
    examples = read_train_records(tmp_path / "a.parquet")
    assert [example.query.text for example in examples] == words
    assert [contents(example.query.images) for example in examples] == wanted
    items = [record.item for record in open_source(tmp_path / "b.parquet")]
    assert [(item.text, contents(item.images)) for item in items if item] == list(zip(words, wanted, strict=True))
    pairs = read_pairs(tmp_path / "a.parquet", ("query_text", "query_image"), ("target_text",))
    assert [contents(record["query"].get("images", ())) for record in pairs.records] == wanted


@pytest.mark.parametrize("kind", LISTS, ids=str)
def test_a_list_of_images_is_several_images_of_one_input(tmp_path: Path, kind: pa.DataType) -> None:
    inner = kind.value_type
    rows = [[cell(inner, 0), cell(inner, 1)], [], [cell(inner, None), cell(inner, 2)]]
    written(tmp_path, pa.array(["a", "b", "c"]), pa.array(rows, kind), "images")
    wanted = [[png(0), png(1)], [], [png(2)]]
    examples = read_train_records(tmp_path / "a.parquet")
    assert [contents(example.query.images) for example in examples] == wanted
    assert all(image.exists() for example in examples for image in example.query.images)
    items = [record.item for record in open_source(tmp_path / "b.parquet")]
    assert [contents(item.images) for item in items if item] == wanted
    pairs = read_pairs(tmp_path / "a.parquet", ("query_text", "query_images"), ("target_text",))
    assert [contents(record["query"].get("images", ())) for record in pairs.records] == wanted


def test_lists_of_texts_of_any_layout_are_candidates(tmp_path: Path) -> None:
    for kind in (pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(pa.large_string())):
        pq.write_table(pa.table({"query": ["q"], "candidates": pa.array([["a", "b"]], kind)}), tmp_path / "a.parquet")
        assert [item.text for item in read_eval_records(tmp_path / "a.parquet")[0].candidates] == ["a", "b"]


def test_a_column_that_is_no_text_and_no_image_is_neither() -> None:
    assert [cell_kind(kind) for kind in (pa.int64(), pa.list_(pa.string()), pa.struct([("a", pa.string())]))] == [
        "other"
    ] * 3


def test_a_path_without_a_file_and_an_empty_cell_are_named(tmp_path: Path) -> None:
    rows = pa.array([{"bytes": None, "path": "lost.png"}, {"bytes": None, "path": None}], HUB)
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"image\[0\]: has no bytes, and its path 'lost.png' is not a file next to"):
        ImageRef(path=str(tmp_path / "a.parquet"), member="image[0]").read()
    with pytest.raises(UserError, match=r"image\[1\]: the cell is empty"):
        archives.read_member(tmp_path / "a.parquet", "image[1]")


ODD_TIMES = {
    "after the year 9999": pa.array([0, 2**62], pa.timestamp("ms")),
    "before the year 1": pa.array([0, -(2**55)], pa.timestamp("ms")),
    "unknown time zone": pa.array([0, 1], pa.timestamp("ms", "Foo/Bar")),
    "duration": pa.array([0, 2**62], pa.duration("s")),
    "date": pa.array([0, 2**30], pa.date32()),
}


@pytest.mark.parametrize("name", ODD_TIMES)
def test_a_time_that_python_cannot_represent_is_kept_as_text(tmp_path: Path, name: str) -> None:
    column = ODD_TIMES[name]
    pq.write_table(pa.table({"text": ["a", "b"], "when": column}), tmp_path / "t.parquet")
    first, second = open_source(tmp_path / "t.parquet")
    whole = column.cast(pa.int32() if name == "date" else pa.int64()).to_pylist()
    assert second.error is None and second.metadata["when"] == f"{whole[1]} {column.type}"
    assert name == "unknown time zone" or first.metadata["when"] in ("1970-01-01", "1970-01-01T00:00:00", "0:00:00")


def test_an_image_cell_that_is_empty_has_no_metadata(tmp_path: Path) -> None:
    columns = {"text": ["a", "b"], "photo": pa.array([None, png(1)]), "at": [datetime.date(2020, 1, 1)] * 2}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert [record.metadata["photo"] is None for record in open_source(tmp_path / "t.parquet")] == [True, False]


def test_columns_of_one_name_are_refused_by_every_reader(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, ["query", "target", "target"]), path)
    for read in (lambda: list(open_source(path)), lambda: read_train_records(path), lambda: read_pairs(path)):
        with pytest.raises(UserError, match="two columns are named 'target'; rename one of them"):
            read()


def test_bytes_in_a_column_of_texts_are_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [b"a"], "id": [b"1"]}), tmp_path / "t.parquet")
    (record,) = open_source(tmp_path / "t.parquet")
    assert "column text: expected a text, found bytes; write the column as text" in str(record.error)
    assert record.key == "0"
    pq.write_table(pa.table({"query_text": [b"a"], "target_text": ["b"]}), tmp_path / "r.parquet")
    with pytest.raises(UserError, match="column query_text: expected texts, found bytes"):
        read_train_records(tmp_path / "r.parquet")


def undecodable(*values: bytes) -> pa.Array:
    """Texts that are not checked, as a writer in another language may have written them."""
    return pa.array(values, pa.binary()).view(pa.string())


def nested(name: str) -> pa.Array:
    values, offsets = undecodable(b"good", b"caf\xe9"), pa.array([0, 1, 2], pa.int32())
    return {
        "text": values,
        "list": pa.ListArray.from_arrays(offsets, values),
        "struct": pa.StructArray.from_arrays([values], ["a"]),
        "map": pa.MapArray.from_arrays(offsets, pa.array(["k", "k"]), values),
    }[name]


@pytest.mark.parametrize("name", ["text", "list", "struct", "map"])
def test_metadata_that_is_not_utf_8_is_an_error_of_its_row(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", "two"], "note": nested(name)}), tmp_path / "a.parquet")
    first, second = open_source(tmp_path / "a.parquet")
    assert first.item is not None and first.item.text == "one" and "good" in first.metadata["note"]
    assert second.item is None and "row 1: column note: not valid UTF-8 at byte 3 (0xe9)" in (second.error or "")


def test_a_column_name_or_a_path_that_is_not_utf_8_is_one_line(tmp_path: Path) -> None:
    table = tmp_path / "names.parquet"
    pq.write_table(pa.table({"text": ["one"], "cafX": ["two"]}), table, store_schema=False)
    table.write_bytes(table.read_bytes().replace(b"cafX", b"caf\xe9"))
    with pytest.raises(UserError, match=r"names\.parquet: b'caf\\xe9' is not valid UTF-8; write the column again"):
        list(open_source(table))
    paths = pa.StructArray.from_arrays([pa.nulls(1, pa.binary()), undecodable(b"caf\xe9")], ["bytes", "path"])
    pq.write_table(pa.table({"image": paths}), tmp_path / "paths.parquet")
    [record] = open_source(tmp_path / "paths.parquet")
    assert record.item is not None
    with pytest.raises(UserError, match=r"paths\.parquet: b'caf\\xe9' is not valid UTF-8"):
        record.item.images[0].load()


def test_metadata_of_the_file_that_is_not_utf_8_changes_nothing(tmp_path: Path) -> None:
    table = pa.table({"text": ["one"]}).replace_schema_metadata({b"\xff": b"caf\xe9", b"pandas": b"{\xff"})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [record.item.text for record in open_source(tmp_path / "a.parquet") if record.item] == ["one"]
