"""A user's pairs: every table layout gives the same pairs; held-out pairs share no image with the others."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from samples import COLORS, draw

from vlm2vec import UserError
from vlm2vec.data.pair_columns import find_columns
from vlm2vec.data.pair_tables import read_rows
from vlm2vec.data.pairs import Pairs, describe, hold_out, read_pairs, write_pairs
from vlm2vec.data.records import read_eval_records, read_train_records
from vlm2vec.media.images import ImageRef

NUM = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(NUM):
        draw(tmp_path / f"images/{i}.png", list(COLORS)[i % 4], i)
    return tmp_path


def rows(query: str = "text", target: str = "image") -> list[dict[str, str]]:
    return [{query: f"number {i}", target: f"images/{i}.png"} for i in range(NUM)]


def write_jsonl(path: Path, content: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def write_csv(path: Path, delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["text", "image"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows())
    return path


def write_parquet(path: Path, of_hub: bool) -> Path:
    content = [(path.parent / row["image"]).read_bytes() for row in rows()]
    images = [{"bytes": raw, "path": None} for raw in content] if of_hub else content
    pq.write_table(pa.table({"text": [row["text"] for row in rows()], "image": images}), path, row_group_size=4)
    return path


def written(folder: Path, source: Path, **columns: Any) -> list[tuple[str | None, bytes]]:
    """Text of the query and pixels of the target of each pair, as training reads them."""
    write_pairs(folder / "mine.data", read_pairs(source, **columns).records, [])
    examples = read_train_records(folder / "mine.data/train/pairs.jsonl")
    return [(example.query.text, example.target.images[0].load().tobytes()) for example in examples]


def test_every_format_gives_the_same_pairs(folder: Path) -> None:
    wanted = [(f"number {i}", ImageRef.of(folder / f"images/{i}.png").load().tobytes()) for i in range(NUM)]
    (folder / "list.json").write_text(json.dumps(rows()))
    beside = folder / "captioned"
    for i in range(NUM):
        draw(beside / f"{i}.png", list(COLORS)[i % 4], i)
        (beside / f"{i}.txt").write_text(f"number {i}\n")
    (folder / "hub").mkdir()
    (folder / "hub/metadata.jsonl").write_text("")
    write_jsonl(
        folder / "hub/metadata.jsonl", [{"file_name": f"../images/{i}.png", "text": f"number {i}"} for i in range(NUM)]
    )
    sources = [
        write_jsonl(folder / "flat.jsonl", rows()),
        write_jsonl(folder / "nested.jsonl", [{"query": r["text"], "target": {"image": r["image"]}} for r in rows()]),
        folder / "list.json",
        write_csv(folder / "comma.csv"),
        write_csv(folder / "semicolon.csv", ";"),
        write_csv(folder / "tabs.tsv", "\t"),
        write_parquet(folder / "bytes.parquet", of_hub=False),
        write_parquet(folder / "hub.parquet", of_hub=True),
        beside,
        folder / "hub",
    ]
    for source in sources:
        assert written(folder, source) == wanted, source


@pytest.mark.parametrize(
    ("query", "target"),
    [
        ("text", "image"),
        ("Caption", "image_path"),
        ("anchor", "positive"),
        ("query", "positive"),
        ("query", "target"),
        ("query_text", "target_image"),
        ("qry", "pos_image_path"),
        ("sentence1", "sentence2"),
        ("prompt", "img"),
    ],
)
def test_columns_are_found_by_their_usual_names(folder: Path, query: str, target: str) -> None:
    content = [{**row, "id": "7"} for row in rows(query, target)]
    pairs = read_pairs(write_jsonl(folder / "pairs.jsonl", content))
    assert (pairs.columns.query, pairs.columns.target, pairs.columns.unused) == ((query,), (target,), ("id",))
    assert pairs.records[5]["query"] == {"text": "number 5"}
    assert [Path(image.path or "").name for image in pairs.records[5]["target"]["images"]] == ["5.png"]


def test_given_columns_reverse_the_direction_and_join_text_and_image(folder: Path) -> None:
    content = [{**row, "answer": str(i)} for i, row in enumerate(rows())]
    file = write_jsonl(folder / "pairs.jsonl", content)
    reverse = read_pairs(file, query=["image"], target=["text"])
    assert reverse.columns.unused == ("answer",) and "images" in reverse.records[0]["query"]
    joined = read_pairs(file, query=["text", "image"], target=["answer"]).records[1]
    assert joined["query"]["text"] == "number 1" and len(joined["query"]["images"]) == 1
    assert joined["target"] == {"text": "1"}


def test_negatives_are_columns_or_lists_and_captions_are_expanded(folder: Path) -> None:
    columns = {"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": "", "negative_3": "d"}
    assert [n["text"] for n in read_pairs(write_jsonl(folder / "a.jsonl", [columns])).records[0]["negatives"]] == [
        "c",
        "d",
    ]
    lists = {"query": "a", "positive": "b", "negatives": ["c", "d"]}
    assert [n["text"] for n in read_pairs(write_jsonl(folder / "b.jsonl", [lists])).records[0]["negatives"]] == [
        "c",
        "d",
    ]
    captions = {"captions": ["one", "two"], "image": "images/0.png"}
    assert [r["query"]["text"] for r in read_pairs(write_jsonl(folder / "c.jsonl", [captions])).records] == [
        "one",
        "two",
    ]


def test_held_out_queries_rank_all_held_out_targets(folder: Path) -> None:
    pairs = read_pairs(write_jsonl(folder / "pairs.jsonl", rows()))
    train, held = hold_out(pairs, 0.5)
    assert (len(train), len(held)) == (3, 3)
    write_pairs(folder / "mine.data", train, held)
    queries = read_eval_records(folder / "mine.data/eval/HeldOut")
    assert [query.query.text for query in queries] == [record["query"]["text"] for record in held]
    assert all(len(query.candidates) == 1 and query.relevant == (0,) for query in queries)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=60), st.floats(0, 0.99))
def test_no_held_out_image_is_trained_on(numbers: list[tuple[int, int]], share: float) -> None:
    records = [
        {"query": {"text": f"caption {query}"}, "target": {"images": [ImageRef(path=f"{image}.png")]}}
        for query, image in numbers
    ]
    pairs = Pairs(Path("x.jsonl"), find_columns("x", ["text", "image"]), records)
    train, held = hold_out(pairs, share)
    assert len(train) + len(held) == len(records) and len(held) <= round(share * len(records))
    assert not {r["target"]["images"][0].path for r in train} & {r["target"]["images"][0].path for r in held}
    assert (train, held) == hold_out(pairs, share)


def test_bad_rows_are_named_together(folder: Path) -> None:
    content: list[dict[str, Any]] = [*rows()]
    content[1] = {"text": "", "image": "images/1.png"}
    content[3] = {"text": "three", "image": "images/absent.png"}
    content[4] = {"text": 4, "image": "images/4.png"}
    content[5] = {"text": "five", "image": None}
    with pytest.raises(UserError) as caught:
        read_pairs(write_jsonl(folder / "pairs.jsonl", content))
    message = str(caught.value)
    for part in (
        "line 2: query is empty",
        "line 4, image: images/absent.png: image not found",
        "found 4",
        "and 1 more rows",
    ):
        assert part in message


def test_images_without_a_caption_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.avif", "b.jp2", "c.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"caption {name}")
    assert [row["image"] for _, row in read_rows(tmp_path)] == ["a.avif", "b.jp2"]
    assert "skipped 1 images without a caption; the first is c.png" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "a\\ud83d", "image": "b.png"}', "line 1: character 2 is a lone surrogate"),
        ('{"query": {"text": 5}, "target": "b"}', "line 1: expected a text, found 5"),
        ('{"query": {"text": "a", "instruction": 5}, "target": "b"}', "line 1: expected a text, found 5"),
        (
            '{"text": "a", "image": "https://a.b/c.png"}',
            "line 1, image: image 'https://a.b/c.png': URLs are not fetched",
        ),
    ],
)
def test_a_value_that_is_no_text_is_an_error_of_its_row(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{row}\n")
    with pytest.raises(UserError) as caught:
        read_pairs(tmp_path / "a.jsonl")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_column_of_grades_that_is_not_used_is_said_to_mean_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": 0}\n' * 4)
    assert (
        "unused: label; every row is trained as a match, whatever label says"
        in describe(read_pairs(tmp_path / "a.jsonl"))[0]
    )
