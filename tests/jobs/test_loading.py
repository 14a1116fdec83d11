"""A folder of parts becomes the rows of a store, each once, and other programs read it as one table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
from jobs.killed import FACTS, Toy
from qdrant_client import QdrantClient, models
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.errors import UserError
from vlm2vec.jobs import loading
from vlm2vec.jobs.embed import EmbedSettings, Job
from vlm2vec.jobs.loading import load_parts
from vlm2vec.jobs.parts import part_name, write_part
from vlm2vec.jobs.records import Record
from vlm2vec.jobs.sources import open_source
from vlm2vec.retrieval.open import open_store
from vlm2vec.types import EmbeddingInput

NUM, BAD = 50, (7, 20, 49)
pytestmark = pytest.mark.filterwarnings("ignore:Local mode")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """50 rows of a table in parts of 4, three of them without a text."""
    rows = [{"id": f"r{i}", "text": "" if i in BAD else f"text {i}", "price": i / 4} for i in range(NUM)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = Job(open_source(tmp_path / "rows.jsonl"), tmp_path / "vectors", EmbedSettings(part=4), FACTS)
    job.run(Toy())
    assert job.finish().num_vectors == NUM - len(BAD)
    return tmp_path / "vectors"


def expected() -> dict[str, np.ndarray]:
    good = [i for i in range(NUM) if i not in BAD]
    vectors = Toy().encode_document([EmbeddingInput(f"text {i}") for i in good])
    return {f"r{i}": vector for i, vector in zip(good, vectors, strict=True)}


def check(found: dict[str, Any]) -> None:
    assert found.keys() == expected().keys()
    for key, vector in expected().items():
        np.testing.assert_allclose(np.asarray(found[key], np.float32), vector, rtol=1e-6)


def test_the_folder_is_a_table_of_good_rows_for_any_reader_of_parquet(folder: Path) -> None:
    assert len(list(folder.glob("*.parquet"))) == 13 and not (folder.parent / "vectors.parts").exists()
    table = pd.read_parquet(folder)
    assert len(table) == NUM - len(BAD)
    check(dict(zip(table["key"], table["vector"], strict=True)))
    assert json.loads(table["metadata"][3]) | {"v2v_path": ""} == {
        "v2v_text": "text 3", "price": 0.75, "v2v_path": "", "v2v_kind": "row", "v2v_row": 4
    }  # fmt: skip
    errors = [json.loads(line)["key"] for line in (folder.parent / "errors.jsonl").read_text().splitlines()]
    assert errors == [f"r{i}" for i in BAD]


def test_lancedb_takes_the_folder_as_a_stream_of_batches(folder: Path, tmp_path: Path) -> None:
    reader = ds.dataset(folder).scanner(columns=["key", "vector", "metadata"], batch_size=8).to_reader()
    table = lancedb.connect(tmp_path / "db").create_table("photos", data=reader)
    rows = table.to_arrow()
    assert len(rows) == NUM - len(BAD)
    check(dict(zip(rows["key"].to_pylist(), rows["vector"].to_pylist(), strict=True)))


def test_qdrant_takes_the_folder_as_a_stream_of_points(folder: Path) -> None:
    client = QdrantClient(":memory:")
    client.create_collection("photos", models.VectorParams(size=FACTS.dim, distance=models.Distance.DOT))
    rows = (row for batch in ds.dataset(folder).to_batches(batch_size=8) for row in batch.to_pylist())
    client.upload_points(
        "photos",
        (
            models.PointStruct(id=i, vector=row["vector"], payload={"key": row["key"], **json.loads(row["metadata"])})
            for i, row in enumerate(rows)
        ),
    )
    points, _ = client.scroll("photos", limit=100, with_vectors=True)
    assert len(points) == NUM - len(BAD)
    check({point.payload["key"]: point.vector for point in points})


@pytest.mark.parametrize("address", ["{folder}/photos.lance", "qdrant://{folder}/q/photos"], ids=["lance", "qdrant"])
def test_a_store_has_every_row_once_after_a_killed_load_and_holds_few_rows_at_a_time(
    folder: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = address.format(folder=tmp_path)
    monkeypatch.setattr(loading, "ROWS_A_COMMIT", 10)
    store = open_store(uri, FACTS)
    kind, sizes = type(store), []
    store.close()
    real = kind.add

    def killed_at_the_third(self: Any, keys: list[str], *rest: Any) -> None:
        if len(sizes) == 2:
            sizes.append(0)
            raise KeyboardInterrupt
        sizes.append(len(keys))
        real(self, keys, *rest)

    monkeypatch.setattr(kind, "add", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        load_parts(folder, uri)
    report = load_parts(folder, uri)
    assert max(sizes) < 10 + 4 and sum(sizes) == NUM - len(BAD), "no row is written twice"
    assert (report.num_new, report.num_known) == (sum(sizes[3:]), sum(sizes[:2]))
    store = open_store(uri)
    (rows,) = store.scan(vectors=True)
    assert store.facts == FACTS and len(rows.keys) == NUM - len(BAD)
    check(dict(zip(rows.keys, rows.vectors_ND, strict=True)))
    assert {one["price"] for one in rows.metadata} == {i / 4 for i in range(NUM) if i not in BAD}
    store.close()
    assert load_parts(folder, uri).num_new == 0


def test_a_new_store_holds_each_vector_once_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = replace(FACTS, dim=512)
    vectors_ND = np.random.default_rng(0).standard_normal((2000, 512), np.float32)
    for number in range(20):
        records = [Record(f"{number}-{row}", EmbeddingInput("text")) for row in range(100)]
        part_ND = vectors_ND[number * 100 : number * 100 + 100]
        write_part(tmp_path / "vectors" / part_name(number), records, part_ND, {}, facts)
    monkeypatch.setattr(loading, "ROWS_A_COMMIT", 200)
    assert load_parts(tmp_path / "vectors", str(tmp_path / "photos.lance")).num_new == 2000
    size = sum(file.stat().st_size for file in (tmp_path / "photos.lance").rglob("*") if file.is_file())
    assert vectors_ND.nbytes < size < 1.2 * vectors_ND.nbytes


def test_the_command_loads_a_folder_and_refuses_what_is_none_or_of_another_model(folder: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "photos.lance")
    done = CliRunner().invoke(app, ["load", str(folder), "--store", store])
    assert (
        done.exit_code == 0 and "47 new, 0 already there" in done.output and "47 rows, search is exact" in done.output
    )
    with pytest.raises(UserError, match=r"no part-\*\.parquet here; make the folder with: vlm2vec embed"):
        load_parts(tmp_path, store)
    with pytest.raises(UserError, match="was made with"):
        other = Job(
            open_source(tmp_path / "rows.jsonl"),
            tmp_path / "other",
            EmbedSettings(),
            type(FACTS)("other", "0" * 16, 8, about={"weights": "other"}),
        )
        other.run(Toy())
        other.finish()
        load_parts(tmp_path / "other", store)


def test_a_folder_in_float16_takes_half_the_bytes(folder: Path, tmp_path: Path) -> None:
    job = Job(
        open_source(tmp_path / "rows.jsonl"), tmp_path / "half", EmbedSettings(precision="float16", part=4), FACTS
    )
    job.run(Toy())
    job.finish()
    dataset = ds.dataset(tmp_path / "half")
    assert str(dataset.schema.field("vector").type.value_type) == "halffloat"
    report = load_parts(tmp_path / "half", str(tmp_path / "half.lance"))
    assert report.num_rows == NUM - len(BAD)
