"""What other libraries raise is one line that names the file, store or setting; one place a library turns it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny.fixtures import *  # noqa: F403 - fixtures

from vlm2vec.data.pair_tables import read_rows
from vlm2vec.data.records import read_train_records
from vlm2vec.errors import UserError
from vlm2vec.jobs.sources import open_source
from vlm2vec.models.checkpoints.folder import add_adapter
from vlm2vec.models.loading import load_base
from vlm2vec.retrieval.open import open_store
from vlm2vec.retrieval.vector_store import StoreFacts

FACTS = StoreFacts("toy", "abc", 16, about={})


def one_line(caught: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts), str(caught.value)


def parquet() -> bytes:
    image = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(image, "PNG")
    rows = {"query_text": ["a", "b"], "query_image": [image.getvalue(), None], "target_text": ["c", "dé"]}
    output = io.BytesIO()
    pq.write_table(pa.table(rows), output)
    return output.getvalue()


PARQUET = parquet()
PAGES = len(PARQUET) - 8 - int.from_bytes(PARQUET[-8:-4], "little")
"""Bytes before the footer. pyarrow ends the process on some footers that are damaged in one bit."""


@given(place=st.integers(0, PAGES - 1), bits=st.integers(1, 255), length=st.integers(0, len(PARQUET)))
def test_a_damaged_parquet_file_gives_rows_or_one_line_with_its_name(
    tmp_path_factory: pytest.TempPathFactory, place: int, bits: int, length: int
) -> None:
    flipped = PARQUET[:place] + bytes([PARQUET[place] ^ bits]) + PARQUET[place + 1 :]
    for name, content in (("flipped", flipped), ("short", PARQUET[:length])):
        path = tmp_path_factory.getbasetemp() / f"{name}.parquet"
        path.write_bytes(content)
        for read in (
            lambda path: [image.load() for row in open_source(path) for image in (row.item.images if row.item else ())],
            lambda path: list(read_rows(path)),
            lambda path: [image.load() for pair in read_train_records(path) for image in pair.query.images],
        ):
            try:
                read(path)
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)


def test_a_damaged_store_is_one_line_whatever_is_asked_of_it(tmp_path: Path) -> None:
    uri = f"{tmp_path}/photos.lance"
    store = open_store(uri, FACTS)
    vectors = np.eye(16, dtype=np.float32)
    store.upsert([str(i) for i in range(16)], vectors, [{"width": i} for i in range(16)])
    for file in (tmp_path / "photos.lance/data").iterdir():
        file.unlink()
    store = open_store(uri, None)
    calls = (
        lambda: store.search(vectors[0], 3),
        lambda: store.search(vectors[0], 3, "width > 3"),
        lambda: store.count("width > 3"),
        lambda: list(store.scan()),
        lambda: store.fetch(["1"]),
        lambda: store.delete(["1"]),
        lambda: store.upsert(["1"], vectors[:1], [{"width": "wide"}]),
    )
    for call in calls:
        with pytest.raises(UserError) as caught:
            call()
        one_line(caught, uri, "LanceDB cannot read or write this store")


def test_facts_of_another_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        StoreFacts.from_json('{"model": "toy", "flavour": 1}')
    one_line(caught, "another version of vlm2vec")


@pytest.mark.parametrize("targets", [["no_such_layer"], ["model"], "("])
def test_lora_targets_that_peft_refuses_are_one_line(tiny_vlm, targets: list[str] | str) -> None:
    import torch

    backbone = load_base(str(tiny_vlm("qwen2_vl")), torch.float32, None, {})
    with pytest.raises(UserError) as caught:
        add_adapter(backbone, 4, 4, 0.0, targets)
    one_line(caught, "lora: PEFT cannot load this adapter onto generic")


def test_a_text_of_parquet_that_is_not_utf_8_is_an_error_of_its_row(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"caf\xe9", b"more"]).cast(pa.large_binary()).view(pa.large_string())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts, "n": [1, 2, 3]}), path)
    records = list(open_source(path))
    assert [record.item and record.item.text for record in records] == ["good", None, "more"]
    assert f"{path}, row 1: column text: not valid UTF-8 at byte 3 (0xe9)" in (records[1].error or "")
    for read, name in ((read_train_records, "query_text"), (lambda path: list(read_rows(path)), "query")):
        pq.write_table(pa.table({name: texts, "target_text" if name == "query_text" else "target": ["x"] * 3}), path)
        with pytest.raises(UserError) as caught:
            read(path)
        one_line(caught, f"{path}, row 1", "not valid UTF-8")
