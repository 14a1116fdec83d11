"""Training pairs as Arrow rows: what they hold, what they read, and what a data worker copies of them."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm2vec.data.mmeb.images import TRAIN_COLUMNS
from vlm2vec.data.mmeb.train_rows import TrainRows, read_train_set
from vlm2vec.errors import UserError

ROWS = 20_000


def columns(rows: range) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [""] * len(rows) for name in TRAIN_COLUMNS}
    found["qry"] = [
        f"<|image_1|>\nRepresent the given image with the following question: what is thing {i}?" for i in rows
    ]
    found["qry_image_path"] = [f"images/Set/train/{i // 4:012d}.jpg" for i in rows]
    found["pos_text"] = [f"answer {i % 100}" for i in rows]
    return found


def write(root: Path, name: str, table: dict[str, Any], number: int = 0) -> None:
    (root / name).mkdir(exist_ok=True)
    pq.write_table(pa.table(table), root / name / f"original-{number:05d}.parquet", row_group_size=1000)


@pytest.fixture
def rows(tmp_path: Path) -> TrainRows:
    write(tmp_path, "Set", columns(range(ROWS // 2)), 0)
    write(tmp_path, "Set", columns(range(ROWS // 2, ROWS)), 1)
    return read_train_set(tmp_path, "Set")


def test_a_pair_costs_less_than_180_bytes(rows: TrainRows) -> None:
    assert rows.table.nbytes + rows.numbers.nbytes < 180 * ROWS  # 1.66 million pairs: 300 MB


def test_rows_by_number_slices_and_iteration_are_equal_and_name_their_file(rows: TrainRows) -> None:
    whole = list(rows)
    assert whole == [rows[i] for i in range(ROWS)] == [*rows[: ROWS // 3], *rows[ROWS // 3 :]]
    assert rows[-1] == whole[-1] and rows[4:0:-2] == whole[4:0:-2]
    assert rows[ROWS - 1].origin.endswith(f"original-00001.parquet, row {ROWS // 2 - 1}")
    with pytest.raises(IndexError):
        rows[ROWS]


def test_a_cap_drops_rows_while_reading_and_the_rest_keep_their_origins(rows: TrainRows, tmp_path: Path) -> None:
    chosen = [3, 9_999, 10_000, 19_999]
    few = read_train_set(tmp_path, "Set", choose=lambda number: chosen if number == ROWS else [])
    assert list(few) == [rows[i] for i in chosen]
    assert [example.origin for example in few] == [rows[i].origin for i in chosen]
    assert few.table.nbytes < 4000
    assert list(rows.only(chosen)) == list(few)


def test_each_image_is_looked_up_once_a_column_and_each_archive_once_a_set(
    rows: TrainRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[Path] = []
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: looked_up.append(path) or is_file(path))
    images = list(rows.images())
    assert len(images) == len(set(images)) == ROWS // 4
    assert {image.origin for image in images} >= {f"{rows.files[0]}, row 0, field qry_image_path"}
    list(rows)
    assert len(looked_up) <= 2  # images_zip/Set.zip and images.zip


def test_a_data_worker_that_reads_every_pair_copies_less_than_20_megabytes(rows: TrainRows) -> None:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    worker = fork.Process(target=read_all, args=(rows, theirs))
    worker.start()
    assert ours.recv() < 20 << 20
    worker.join()


def read_all(rows: TrainRows, answer: Connection) -> None:
    before = private_bytes()
    for number in range(len(rows)):
        rows[number]
    answer.send(private_bytes() - before)


def private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def test_texts_of_any_arrow_type_are_read_and_other_columns_are_named(tmp_path: Path) -> None:
    table = columns(range(3))
    plain = pa.table(table)
    odd = plain.set_column(0, "qry", plain["qry"].cast(pa.large_string()).dictionary_encode())
    (tmp_path / "Odd").mkdir()
    pq.write_table(odd, tmp_path / "Odd/original-0.parquet")
    write(tmp_path, "Plain", table)
    assert [e.query for e in read_train_set(tmp_path, "Odd")] == [e.query for e in read_train_set(tmp_path, "Plain")]
    write(tmp_path, "Numbers", {**table, "pos_text": [1, 2, 3]})
    with pytest.raises(UserError, match="column pos_text: expected texts, found int64"):
        read_train_set(tmp_path, "Numbers")


def test_mined_and_published_negatives_may_be_in_one_set(tmp_path: Path) -> None:
    table = columns(range(2))
    write(tmp_path, "Set", {**table, "neg_text": ["one", ""]}, 0)
    lists: dict[str, Any] = {"neg_text": [["two", "three"], []], "neg_image_path": [["", "images/Set/x.jpg"], []]}
    write(tmp_path, "Set", {**table, **lists}, 1)
    found = [[item.text for item in example.negatives] for example in read_train_set(tmp_path, "Set")]
    assert found == [["one"], [], ["two", "three"], []]
    assert all(not example.negatives for example in read_train_set(tmp_path, "Set", use_negatives=False))


@pytest.mark.parametrize("lists", [{"neg_text": [[], ["a"]], "neg_image_path": [[], []]}, {"neg_text": [["a"], ["b"]]}])
def test_negatives_whose_lists_differ_in_length_are_named_by_row(tmp_path: Path, lists: dict[str, Any]) -> None:
    write(tmp_path, "Set", {**columns(range(2)), **lists})
    with pytest.raises(UserError, match=r"row [01]: expected neg_text and neg_image_path to be two texts or two lists"):
        read_train_set(tmp_path, "Set")


def test_scores_of_a_judge_are_read_beside_files_without_them_and_must_fit_the_negatives(tmp_path: Path) -> None:
    table = columns(range(2))
    lists: dict[str, Any] = {"neg_text": [["a", "b"], []], "neg_image_path": [["", ""], []]}
    scores: dict[str, Any] = {"pos_score": [2.0, 1.0], "neg_score": [[0.5, -1.0], []]}
    write(tmp_path, "Set", {**table, **lists, **scores}, 0)
    write(tmp_path, "Set", table, 1)
    assert [e.scores for e in read_train_set(tmp_path, "Set")] == [(2.0, 0.5, -1.0), (1.0,), (), ()]
    assert [e.scores for e in read_train_set(tmp_path, "Set", use_negatives=False)] == [(2.0,), (1.0,), (), ()]
    write(tmp_path, "Short", {**table, **lists, **scores, "neg_score": [[0.5], []]})
    with pytest.raises(UserError, match="row 0: field neg_score: expected a list of numbers, one for each negative"):
        read_train_set(tmp_path, "Short")
