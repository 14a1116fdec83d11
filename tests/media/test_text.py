"""Text of files: the text that was written, or an error that names the place; nothing is replaced or guessed."""

from __future__ import annotations

import codecs
import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec.data.json_lines import JsonLines
from vlm2vec.data.pair_tables import read_rows
from vlm2vec.data.records import read_train_records
from vlm2vec.errors import UserError
from vlm2vec.files import read_json
from vlm2vec.jobs.records import SourceSettings
from vlm2vec.jobs.sources import open_source
from vlm2vec.media.text import ENCODING, MARK, decode, parse_json

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1", "shift_jis")
ENCODINGS += ("gb18030", "big5", "koi8-r", "cp037", "iso2022_jp")
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters=MARK), min_size=1, max_size=12)


def write(path: Path, text: str, encoding: str, mark: bool = False) -> Path:
    path.write_bytes((MARK if mark else "").encode(encoding) + text.encode(encoding))
    return path


def read(path: Path, encoding: str | None = None) -> list[str | None]:
    chosen = SourceSettings() if encoding is None else SourceSettings(encoding=encoding)
    return [record.item.text if record.item else f"error: {record.error}" for record in open_source(path, chosen)]


def as_csv(texts: list[str]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows([["text"], *([text] for text in texts)])
    return file.getvalue()


@given(texts=st.lists(WORDS, min_size=1, max_size=4), encoding=st.sampled_from(ENCODINGS), mark=st.booleans())
def test_every_kind_of_file_gives_the_text_that_was_written(
    tmp_path: Path, texts: list[str], encoding: str, mark: bool
) -> None:
    texts = [text.encode(encoding, "ignore").decode(encoding).replace(MARK, "").strip() or "x" for text in texts]
    mark = mark and encoding.startswith("utf")
    lines = write(tmp_path / "a.txt", "\n".join(texts), encoding, mark)
    assert read(lines, encoding) == texts
    rows = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    assert read(write(tmp_path / "a.jsonl", rows, encoding, mark), encoding) == texts
    assert read(write(tmp_path / "a.csv", as_csv(texts), encoding, mark), encoding) == texts
    (tmp_path / "notes").mkdir(exist_ok=True)
    write(tmp_path / "notes/a.md", texts[0], encoding, mark)
    assert read(tmp_path / "notes", encoding) == texts[:1]


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "utf-16"])
def test_files_with_the_line_ends_of_old_macs_give_the_same_inputs(tmp_path: Path, encoding: str) -> None:
    texts = ["one é", "two", "three"]
    assert read(write(tmp_path / "a.txt", "\r".join(texts), encoding), encoding) == texts
    rows = "\r".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\r"
    assert read(write(tmp_path / "a.jsonl", rows, encoding), encoding) == texts
    table = as_csv([*texts, 'a "quoted" cell\rof two lines']).replace("\r\n", "\r")
    assert read(write(tmp_path / "a.csv", table, encoding), encoding) == [*texts, 'a "quoted" cell\rof two lines']


def test_training_pairs_with_the_line_ends_of_old_macs_are_the_same_rows(tmp_path: Path) -> None:
    rows = [{"query": f"q{i} é", "target": f"t{i}"} for i in range(600)]  # more than two blocks
    for name, end in (("new", "\n"), ("old", "\r")):
        content = end.join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / f"{name}.jsonl").write_bytes(content.encode())
    new, old = (JsonLines(tmp_path / f"{name}.jsonl") for name in ("new", "old"))
    assert new.sizes == old.sizes and len(old.sizes) > 2
    for block in range(len(old.sizes)):
        assert [row for _, row in old.read(block)] == [row for _, row in new.read(block)]
    assert [row for _, row in read_rows(tmp_path / "old.jsonl")] == rows


def test_a_carriage_return_inside_a_file_with_line_feeds_ends_no_line(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", 'text\n"one\rtwo"\nthree\n', "utf-8")) == ["one\rtwo", "three"]
    long = "x" * (1 << 17)  # longer than the part in which the line end is looked for
    assert read(write(tmp_path / "a.txt", f"a\r{long}\rb", "utf-8")) == ["a", long, "b"]


@given(content=st.binary(max_size=30), encoding=st.sampled_from(ENCODINGS))
def test_any_bytes_are_exactly_their_text_or_an_error(content: bytes, encoding: str) -> None:
    try:
        text = decode(content, "a.txt", encoding)
    except UserError as error:
        name = "UTF-8" if encoding == ENCODING else encoding
        assert str(error).startswith(f"a.txt: not valid {name}") and "\n" not in str(error)
        return
    assert text == content.decode(encoding).lstrip(MARK) and "\0" not in text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv"])
def test_a_file_in_another_encoding_is_refused_and_never_embedded(tmp_path: Path, encoding: str, ending: str) -> None:
    content = {".txt": "café\ncrème", ".jsonl": '{"text": "café"}\n{"text": "crème"}', ".csv": "text\ncafé\ncrème\n"}
    path = write(tmp_path / f"a{ending}", content[ending], encoding)
    try:
        found = read(path)
    except UserError as error:
        found = [f"error: {error}"]
    assert found and all(text.startswith("error: ") for text in found)
    assert all("save it as UTF-8, or give the encoding" in text for text in found[:1])


def test_an_unknown_encoding_stops_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"}', "utf-8")
    for name in ("utf-9", "hex"):
        with pytest.raises(UserError, match=f"unknown encoding '{name}'; expected a name such as utf-8"):
            read(path, name)


def test_a_byte_order_mark_is_part_of_no_record_and_of_no_setting(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", '{"query": "a", "target": "b"}\n', "utf-8", mark=True)
    assert [record.query.text for record in read_train_records(rows)] == ["a"]
    about = write(tmp_path / "config.json", '{"model_type": "llava"}', "utf-8", mark=True)
    assert read_json(about) == {"model_type": "llava"}


def test_an_invalid_byte_is_an_error_of_its_csv_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,place\nred,"a\nb"\ncaf\xe9,here\nblue,there\n')
    assert [text.partition(";")[0] for text in read(path)] == [
        "red",
        f"error: {path}, row 2: byte 0xe9 at character 4 of 'caf\\\\xe9' is not valid UTF-8",
        "blue",
    ]
    path.write_bytes(b"text,caf\xe9\nred,here\n")
    with pytest.raises(UserError, match="first line: byte 0xe9"):
        read(path)


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_the_mark_of_another_encoding_is_one_error_that_names_it(tmp_path: Path, ending: str, encoding: str) -> None:
    path = write(tmp_path / f"a{ending}", "text\nred\nblue\n", encoding)
    with pytest.raises(UserError, match=f"begins with the byte order mark of {encoding}; .* such as {encoding}$"):
        read(path)


def test_a_codec_without_positions_is_one_error_too() -> None:
    with pytest.raises(UserError, match=r"a\.txt: not valid punycode"):
        decode(b"a\nb\n", "a.txt", "punycode")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"n": 1, "n": 2}', "key 'n' appears twice"),
        ('{"deep": {"text": "a", "text": "a"}}', "key 'text' appears twice"),
        ('{"n": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("[" * 100_000 + "]" * 100_000, "recursion"),
        ("{'n': 1}", "at character 2"),
        ('{"n":\n x}', "at line 2, column 2"),
    ],
)
def test_json_that_would_lose_a_value_or_cannot_be_parsed_is_one_error(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json: not valid JSON") as caught:
        parse_json(text, "a.json")
    assert reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 200
    if "\n" not in text:
        rows = write(tmp_path / "a.jsonl", text + '\n{"text": "red"}\n', "utf-8")
        assert [row[:6] for row in read(rows) if row] == ["error:", "red"]
        with pytest.raises(UserError, match="line 1: not valid JSON"):
            read_train_records(rows)


def test_a_line_may_begin_with_a_mark_as_in_joined_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + codecs.BOM_UTF8 + b'{"text": "b"}\n')
    assert read(path) == ["a", "b"]


@pytest.mark.parametrize("name", ["http://a.b/c.png", "https://a.b/c.png", "file:///a.png", "s3://bucket/a.png"])
def test_a_url_of_any_scheme_in_a_table_is_not_taken_for_a_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": name}))
    assert f"row 1: image '{name}': URLs are not fetched" in str(read(tmp_path / "a.jsonl")[0])
    (tmp_path / "b.jsonl").write_text(json.dumps({"query": {"image": name}, "target": "a"}))
    with pytest.raises(UserError, match=r"b\.jsonl, line 1, field query: image .*: URLs are not fetched"):
        read_train_records(tmp_path / "b.jsonl")


def test_an_object_with_image_and_images_loses_neither(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"query": {"image": "a.png", "images": ["b.png"]}, "target": "a"}))
    with pytest.raises(UserError, match=r"a\.jsonl, line 1, field query: input has both image and images"):
        read_train_records(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", ""), ("a.csv", "text\n\n"), ("a.txt", "\n \n"), ("a.jsonl", "")]
)
def test_a_file_without_rows_is_an_error_and_no_empty_source(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    for source in (tmp_path / name, tmp_path) if name != "a.txt" else (tmp_path / name,):
        with pytest.raises(UserError, match="no rows; to remove the rows of an earlier index, use vlm2vec forget"):
            list(open_source(source))
