"""Video rows in every published file format, archives in parts, and bundled class lists."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from data.layouts import draw_image, video_row, write_rows, write_video_set

from vlm2vec.data.mmeb.media import Media
from vlm2vec.data.mmeb.quirks import Quirks
from vlm2vec.data.mmeb.video_rows import form_of, row_files
from vlm2vec.data.mmeb.videos import read_video_set
from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import read_benchmark
from vlm2vec.evaluation.data_check import check_data

NUM_QUERIES = 12


def rows_of(name: str) -> list[dict[str, object]]:
    return [video_row(name, number)[0] for number in range(NUM_QUERIES)]


def as_lines(rows: list[dict[str, object]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "file", "form"),
    [
        ("HMDB51", "data/test.jsonl", "jsonl, test.jsonl"),
        ("SmthSmthV2", "data/test.jsonl", "jsonl, test.jsonl"),
        ("MSVD", "MSVD_test.json", "json, MSVD_test.json"),
        ("DiDeMo", "didemo_test.json", "json, didemo_test.json"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_rows_of_every_form_are_the_rows_of_parquet(name: str, file: str, form: str, mark: str, tmp_path: Path) -> None:
    write_video_set(tmp_path, name)
    wanted = read_video_set(tmp_path, name, Quirks(), "test")
    (tmp_path / name / "data/test-00000-of-00001.parquet").unlink()
    rows = rows_of(name)
    (tmp_path / name / file).write_text(mark + (json.dumps(rows) if file.endswith(".json") else as_lines(rows)))
    (tmp_path / name / file.replace("test", "train")).write_text("not JSON: must not be read")
    assert form_of(row_files(tmp_path / name, "test")) == form
    assert read_video_set(tmp_path, name, Quirks(), "test") == wanted
    (check,) = check_data(read_benchmark("mmeb-v2")[0].only([name]), tmp_path)
    assert check.form == form and check.num_queries == NUM_QUERIES


def test_mvbench_has_a_file_for_each_configuration_whose_name_is_the_subset(tmp_path: Path) -> None:
    write_video_set(tmp_path, "MVBench")
    wanted = read_video_set(tmp_path, "MVBench", Quirks(), "train")
    (tmp_path / "MVBench/data/test-00000-of-00001.parquet").unlink()
    rows = [{key: value for key, value in row.items() if key != "subset"} for row in rows_of("MVBench")]
    (tmp_path / "MVBench/json").mkdir()
    (tmp_path / "MVBench/json/action_count.json").write_text(json.dumps(rows))
    assert read_video_set(tmp_path, "MVBench", Quirks(), "train") == wanted
    (tmp_path / "MVBench/json/action_count.json").unlink()
    write_rows(tmp_path / "MVBench/action_count/train-00000-of-00001.parquet", rows)
    assert read_video_set(tmp_path, "MVBench", Quirks(), "train") == wanted


def test_only_the_stated_split_is_read_and_its_absence_is_named(tmp_path: Path) -> None:
    write_video_set(tmp_path, "MSVD")
    folder = tmp_path / "MSVD/data"
    write_rows(folder / "train-00000-of-00001.parquet", rows_of("MSVD")[:3])
    assert len(read_video_set(tmp_path, "MSVD", Quirks(), "test")) == NUM_QUERIES
    assert len(read_video_set(tmp_path, "MSVD", Quirks(), "train")) == 3
    with pytest.raises(UserError, match=r"no rows of split val; found .*test-00000"):
        read_video_set(tmp_path, "MSVD", Quirks(), "val")


@pytest.mark.parametrize(("content", "problem"), [("{", "not valid JSON"), ("[1]", "row 0: expected an object")])
def test_a_damaged_json_file_is_named(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "MSVD").mkdir()
    (tmp_path / "MSVD/MSVD_test.json").write_text(content)
    with pytest.raises(UserError, match=problem):
        read_video_set(tmp_path, "MSVD", Quirks(), "test")


def test_class_lists_come_with_the_package_and_unlisted_golds_are_added(tmp_path: Path) -> None:
    for name, count in (("K700", 700), ("HMDB51", 51), ("UCF101", 101), ("Breakfast", 10)):
        write_video_set(tmp_path, name, num_frames=1)
        candidates = read_video_set(tmp_path, name, Quirks())[0].candidates
        assert len(candidates) == count + 5  # the rows' five answers are in no list
    assert [item.text for item in candidates[:2]] == ["pancake", "cereal"]


def write_parts(root: Path, compressed: bool, size: int = 400) -> list[Path]:
    """An archive of twenty frames, cut into files."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz" if compressed else "w") as tar:
        for number in range(20):
            file = draw_image(root / f"made/{number}.png", number)
            tar.add(file, f"video_qa/MVBench/a/b.mp4/{number}.png")
    folder = root / "data/video-tasks/frames"
    folder.mkdir(parents=True)
    raw, written = content.getvalue(), []
    for number, begin in enumerate(range(0, len(raw), size)):
        part = folder / f"video_qa.tar{'.gz' if compressed else ''}-{number:02}"
        part.write_bytes(raw[begin : begin + size])
        written.append(part)
    return written


@pytest.mark.parametrize("compressed", [True, False])
def test_an_archive_in_parts_is_read_as_one(compressed: bool, tmp_path: Path) -> None:
    assert len(write_parts(tmp_path, compressed)) > 2
    frames = Media(tmp_path / "data").frames("video-tasks/frames/video_qa/MVBench/a/b.mp4")
    assert len(frames) == 20
    for number in (19, 0, 7):
        assert frames[number].read() == (tmp_path / f"made/{number}.png").read_bytes()


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    write_parts(tmp_path, compressed=True)[1].unlink()
    with pytest.raises(UserError, match=r"video_qa\.tar\.gz-01: this part of the archive is missing"):
        Media(tmp_path / "data").frames("video-tasks/frames/video_qa/MVBench/a/b.mp4")
