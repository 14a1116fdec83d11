from __future__ import annotations

import builtins
import datetime as dt
import decimal
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from samples import draw

from vlm2vec.errors import UserError
from vlm2vec.jobs.records import Record, SourceSettings
from vlm2vec.jobs.sources import open_source
from vlm2vec.media.images import ImageRef
from vlm2vec.retrieval.metadata import own
from vlm2vec.types import EmbeddingInput


def write_pdf(path: Path, colors: list[str]) -> None:
    """A page a colour, drawn by PIL."""
    pages = [Image.new("RGB", (60, 80), color) for color in colors]
    pages[0].save(path, save_all=True, append_images=pages[1:])


def write_video(path: Path, seconds: int) -> None:
    """Ten frames a second; each second is brighter than the one before."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for i in range(10 * seconds):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (50 * (i // 10) + 20,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def brightness(image: ImageRef) -> float:
    return image.load().resize((1, 1)).getpixel((0, 0))[0]


def by_key(path: Path, **settings: object) -> dict[str, Record]:
    records = list(open_source(path, SourceSettings(**settings)))
    assert len({record.key for record in records}) == len(records)
    return {record.key: record for record in records}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    folder = tmp_path / "things"
    draw(folder / "b.png", "red", 0)
    draw(folder / "deep/a.JPG", "blue", 1)
    (folder / "note.md").write_text("a note\n")
    (folder / "empty.txt").write_text(" \n")
    (folder / "left.xyz").write_text("?")
    draw(folder / ".hidden/c.png", "red", 2)
    write_pdf(folder / "doc.pdf", ["red", "blue"])
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 nonsense")
    (folder / "broken.mp4").write_bytes(b"no video")
    write_video(folder / "film.mp4", 4)
    return folder


def test_a_folder_gives_an_input_for_every_file_and_page_and_an_error_for_what_cannot_be_read(mixed: Path) -> None:
    found = by_key(mixed)
    good = {key for key, record in found.items() if record.error is None}
    assert good == {"b.png", "deep/a.JPG", "note.md", "doc.pdf#page-1", "doc.pdf#page-2", "film.mp4"}
    bad = {key: record.error for key, record in found.items() if record.error}
    assert set(bad) == {"empty.txt", "broken.pdf", "broken.mp4"}
    assert all(str(mixed / key) in reason and found[key].item is None for key, reason in bad.items())
    assert found["note.md"].item == EmbeddingInput("a note")
    assert found["doc.pdf#page-2"].metadata == own(path=str(mixed / "doc.pdf"), kind="page", page=2, pages=2)
    red, blue = (found[f"doc.pdf#page-{n}"].item.images[0].load().getpixel((50, 50)) for n in (1, 2))
    assert red[0] > 200 > red[2] and blue[2] > 200 > blue[0]
    assert found["doc.pdf#page-1"].item.images[0].load().size == (120, 160)  # 144 dots an inch


def test_the_order_and_the_versions_stay_and_a_changed_file_has_another_version(mixed: Path) -> None:
    source = open_source(mixed)
    first, second = list(source), list(source)
    assert first == second and source.expected() == 8
    assert source.skipped() == ["Skipped 1 file of other types: 1 .xyz."]
    draw(mixed / "b.png", "green", 5)
    changed = [now.key for before, now in zip(first, source, strict=True) if before.version != now.version]
    assert changed == ["b.png"]


def test_a_video_is_one_input_or_one_input_every_so_many_seconds(mixed: Path) -> None:
    film = mixed / "film.mp4"
    (whole,) = open_source(film)
    assert whole.metadata["v2v_kind"] == "video" and whole.metadata["v2v_seconds"] == pytest.approx(4.0, abs=0.2)
    shades = [brightness(image) for image in whole.item.video.sample(4).images]
    assert shades == pytest.approx([20, 70, 120, 170], abs=8)
    each = by_key(film, every=2.0)
    assert list(each) == ["film.mp4#at-0.000s", "film.mp4#at-2.000s"]
    assert [brightness(record.item.images[0]) for record in each.values()] == pytest.approx([20, 120], abs=8)
    digests = {record.item.images[0].digest() for record in each.values()}
    assert len(digests) == 2 and ImageRef(str(film), "at-0.000s").digest() in digests


def test_a_text_file_is_an_input_a_line(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    found = by_key(tmp_path / "lines.txt")
    assert {key: record.item.text for key, record in found.items()} == {"lines.txt#1": "one", "lines.txt#3": "two"}


def test_json_lines_give_texts_images_metadata_and_an_error_a_bad_row(tmp_path: Path) -> None:
    draw(tmp_path / "p.png", "red", 0)
    rows = [
        {"id": "first", "text": "a", "image": "p.png", "price": 3},
        {"images": ["p.png", "p.png"], "instruction": "Represent."},
        {"text": ""},
        [1],
        {"text": 5},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n{\n")
    found = by_key(file)
    image = ImageRef(path=str(tmp_path / "p.png"))
    assert found["first"].item == EmbeddingInput("a", (image,))
    assert found["first"].metadata["price"] == 3
    assert found["2"].item == EmbeddingInput(None, (image, image), "Represent.")
    assert {key for key, record in found.items() if record.error} == {"3", "4", "5", "6"}
    assert all(f"{file}, row {key}: " in record.error for key, record in found.items() if record.error)


def test_a_csv_file_names_its_columns_and_the_user_may_choose_others(tmp_path: Path) -> None:
    draw(tmp_path / "img/p.png", "red", 0)
    file = tmp_path / "shop.csv"
    file.write_text('file_name,title,shown\nimg/p.png,"a, b",other words\nimg/p.png\n')
    found = by_key(file)
    assert found["1"].item == EmbeddingInput("a, b", (ImageRef(path=str(tmp_path / "img/p.png")),))
    assert found["1"].metadata["shown"] == "other words" and "expected 3 cells" in found["2"].error
    assert by_key(file, text_column="shown")["1"].item.text == "other words"
    with pytest.raises(UserError, match="no column 'none'; there are: file_name, title, shown"):
        list(open_source(file, SourceSettings(text_column="none")))


@pytest.mark.parametrize("gaps", [False, True])
def test_parquet_cells_are_images_that_are_read_late(tmp_path: Path, gaps: bool) -> None:
    draw(tmp_path / "p.png", "blue", 0)
    content = (tmp_path / "p.png").read_bytes()
    struct = {"bytes": content, "path": "p.png"}
    rows = [{"caption": f"c{i}", "image": None if gaps and i == 1 else struct, "raw": content} for i in range(3)]
    file = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    found = by_key(file)
    assert [record.item.text for record in found.values()] == ["c0", "c1", "c2"]
    assert len(found["1"].item.images) == (0 if gaps else 1)
    assert found["2"].item.images[0].read() == content
    only = by_key(file, image_column="raw")
    assert only["1"].item.images[0].load().size == (40, 40)


def test_a_folder_of_tables_and_an_archive_are_sources_too(tmp_path: Path) -> None:
    import zipfile

    folder = tmp_path / "tables"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text('{"text": "x"}\n')
    assert list(by_key(folder)) == ["a.jsonl#1", "b.jsonl#1"]
    draw(tmp_path / "p.png", "red", 0)
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.write(tmp_path / "p.png", "in/p.png")
    assert by_key(tmp_path / "p.zip")["in/p.png"].item.images[0].load().size == (40, 40)


def test_what_is_no_source_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.xyz").write_text("")
    (tmp_path / "x.parquet").write_text("no")
    for name, words in [("no", "no such"), ("empty", "no images"), ("x.xyz", "kind"), ("x.parquet", "readable")]:
        with pytest.raises(UserError, match=words) as caught:
            list(open_source(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_a_library_that_is_not_installed_stops_with_the_extra_to_install(mixed: Path, monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pypdfium2":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"vlm2vec\[pdf\]"):
        list(open_source(mixed))


def test_metadata_of_any_arrow_type_is_a_text_a_number_or_a_truth_value(tmp_path: Path) -> None:
    day = dt.datetime(2024, 5, 6, 7, 8, 9)
    cells = {
        "small": pa.array([1], pa.int8()),
        "large": pa.array([2**64 - 1], pa.uint64()),
        "half": pa.array([np.float16(1.5)], pa.float16()),
        "date": pa.array([day.date()]),
        "zone": pa.array([day], pa.timestamp("ns", "UTC")),
        "duration": pa.array([dt.timedelta(days=1, seconds=5)]),
        "price": pa.array([decimal.Decimal("1.10")]),
        "tags": pa.array([["a", "b"]]),
        "empty": pa.array([[]], pa.list_(pa.string())),
        "pairs": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "word": pa.array(["x"]).dictionary_encode(),
        "blob": pa.array([b"\0\xff"]),
        "nothing": pa.array([None]),
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], **cells}), path)
    [record] = open_source(path)
    assert {name: record.metadata[name] for name in cells} == {
        "small": 1,
        "large": "18446744073709551615",
        "half": 1.5,
        "date": "2024-05-06",
        "zone": "2024-05-06T07:08:09+00:00",
        "duration": "1 day, 0:00:05",
        "price": "1.10",
        "tags": '["a", "b"]',
        "empty": "[]",
        "pairs": '[["k", 1]]',
        "word": "x",
        "blob": f"{path}:blob[0]",
        "nothing": None,
    }


def test_a_pipe_in_a_folder_is_an_error_of_its_own_and_is_not_waited_for(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", "red", 0)
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    first, *others = open_source(tmp_path)
    assert first.item is not None
    assert ["not a regular file, or a link to a file that is gone" in (one.error or "") for one in others] == [True] * 2
