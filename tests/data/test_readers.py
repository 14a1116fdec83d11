from __future__ import annotations

import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import TRAIN_COLUMNS, draw, write_train_set

from vlm2vec import UserError
from vlm2vec.data.mmeb.images import list_sets, read_eval_set
from vlm2vec.data.mmeb.train_rows import read_train_set


def write_eval_set(root: Path, name: str, rows: list[dict[str, object]]) -> None:
    (root / name).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / name / "test-00000-of-00001.parquet")


def test_pairs_keep_the_published_prompt_and_find_their_images(train_root: Path) -> None:
    examples = read_train_set(train_root, "Color")
    assert len(examples) == 16
    assert examples[3].query.text == "<|image_1|>\nName the colour\n"
    assert examples[3].query.images[0].load().size == (40, 40)
    assert examples[3].target.text == "yellow"
    assert [negative.text for negative in examples[3].negatives] == ["red"]
    assert read_train_set(train_root, "Color", use_negatives=False)[3].negatives == ()
    assert list_sets(train_root) == ["Color", "Find"]


def test_images_are_read_straight_from_the_zip_of_their_set(tmp_path: Path) -> None:
    draw(tmp_path / "red.png", "red", 0)
    (tmp_path / "images_zip").mkdir()
    with zipfile.ZipFile(tmp_path / "images_zip/Color.zip", "w") as archive:
        archive.write(tmp_path / "red.png", "Color/Train/red.png")
    row = {"qry": "<|image_1|>\n", "qry_image_path": "images/Color/Train/red.png", "pos_text": "red"}
    write_train_set(tmp_path, "Other", [row])
    assert read_train_set(tmp_path, "Other")[0].query.images[0].load().size == (40, 40)


def test_evaluation_rows_share_equal_candidates_and_read_from_images_zip(tmp_path: Path) -> None:
    draw(tmp_path / "red.png", "red", 0)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "red.png", "A/red.png")
    row = {"qry_text": "q", "qry_img_path": "", "tgt_text": ["<|image_1|>\n", "no"], "tgt_img_path": ["A/red.png", ""]}
    write_eval_set(tmp_path, "A", [row, row])
    first, second = read_eval_set(tmp_path, "A")
    assert first.candidates[0] is second.candidates[0]
    assert first.candidates[0].images[0].load().size == (40, 40)
    assert first.relevant == (0,)


def test_a_placeholder_without_an_image_stays_a_token_as_in_the_published_webqa(tmp_path: Path) -> None:
    write_train_set(tmp_path, "WebQA", [{"qry": "<|image_1|>\nFind an answer: who?\n", "pos_text": "me"}])
    assert read_train_set(tmp_path, "WebQA")[0].query.text == "<|image_pad|>\nFind an answer: who?\n"


def test_unknown_and_missing_columns_are_named(tmp_path: Path) -> None:
    file = write_train_set(tmp_path, "A", [{"qry": "a", "pos_text": "b", "extra": "c"}])
    with pytest.raises(UserError, match="column extra is unknown; expected qry"):
        read_train_set(tmp_path, "A")
    pq.write_table(pa.table({name: ["x"] for name in TRAIN_COLUMNS if name != "pos_text"}), file)
    with pytest.raises(UserError, match=r"original.*parquet: column pos_text is missing"):
        read_train_set(tmp_path, "A")


def test_an_empty_set_and_an_empty_row_are_named(tmp_path: Path) -> None:
    write_train_set(tmp_path, "A", [{"qry": "a", "pos_text": "b"}, {"qry": "a"}])
    with pytest.raises(UserError, match="row 1: field pos_text and its image are both empty"):
        read_train_set(tmp_path, "A")
    schema = pa.schema([(name, pa.string()) for name in TRAIN_COLUMNS])
    pq.write_table(schema.empty_table(), tmp_path / "A/original-00000-of-00001.parquet")
    with pytest.raises(UserError, match="the set is empty"):
        read_train_set(tmp_path, "A")


def test_a_set_that_is_not_there_lists_those_that_are(train_root: Path) -> None:
    with pytest.raises(UserError, match="known sets: Color, Find"):
        read_train_set(train_root, "Colour")
    with pytest.raises(UserError, match="no such data folder"):
        list_sets(train_root / "absent")


def test_a_damaged_parquet_file_and_a_damaged_zip_are_named(tmp_path: Path) -> None:
    file = write_train_set(tmp_path, "A", [{"qry": "a", "pos_text": "b"}])
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="not a readable parquet file"):
        read_train_set(tmp_path, "A")
    write_train_set(tmp_path, "A", [{"qry": "<|image_1|>", "qry_image_path": "images/A/x.png", "pos_text": "b"}])
    (tmp_path / "images_zip").mkdir()
    (tmp_path / "images_zip/A.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"A\.zip: not a readable zip"):
        read_train_set(tmp_path, "A")[0].query.images[0].load()


def test_candidates_that_do_not_line_up_are_named_by_row(tmp_path: Path) -> None:
    write_eval_set(tmp_path, "A", [{"qry_text": "q", "qry_img_path": "", "tgt_text": ["a"], "tgt_img_path": ["", ""]}])
    with pytest.raises(UserError, match="row 0: expected a query and as many tgt_text as tgt_img_path"):
        read_eval_set(tmp_path, "A")


def test_the_second_wording_of_a_published_set_is_read_by_name(tmp_path: Path) -> None:
    write_train_set(tmp_path, "Set", [{"qry": "one wording", "pos_text": "a"}])
    file = tmp_path / "Set/original-00000-of-00001.parquet"
    file.rename(file.with_name("diverse_instruction-00000-of-00001.parquet"))
    assert read_train_set(tmp_path, "Set", wording="diverse")[0].query.text == "one wording"
    with pytest.raises(UserError, match=r"Set: no original-\*.parquet found; this folder has no set"):
        read_train_set(tmp_path, "Set")
