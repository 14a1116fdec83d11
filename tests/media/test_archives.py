"""Archives are read in place; members equal the original files."""

from __future__ import annotations

import gzip
import io
import multiprocessing
import random
import tarfile
import zipfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from PIL import Image

from vlm2vec.errors import UserError
from vlm2vec.jobs.sources import open_source
from vlm2vec.media import archives
from vlm2vec.media.archives import SeekableGzip, members, read_member
from vlm2vec.media.images import ImageRef
from vlm2vec.media.zips import SharedZip

CONTENT = {f"folder/file_{i}.bin": random.Random(i).randbytes(3000 + 977 * i) for i in range(40)}


def write(path: Path) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in CONTENT.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tar:
        for name, content in CONTENT.items():
            entry = tarfile.TarInfo(f"./{name}" if "7" in name else name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture(autouse=True)
def small_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "SPACING", 50_000)
    monkeypatch.setattr(archives, "CHUNK", 1000)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz"])
def test_every_file_is_read_in_any_order(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    assert members(path) == set(CONTENT)
    order = [*CONTENT, *reversed(CONTENT), *random.Random(0).sample(list(CONTENT), 30)]
    assert all(read_member(path, member) == CONTENT[member] for member in order)


def test_a_compressed_file_reads_like_the_plain_one_from_any_place(tmp_path: Path) -> None:
    content = b"".join(CONTENT.values())
    halves = (content[:300_000], content[300_000:])
    (tmp_path / "a.gz").write_bytes(b"".join(map(gzip.compress, halves)))  # two, one after the other
    file = SeekableGzip(str(tmp_path / "a.gz"))
    chance = random.Random(1)
    for _ in range(200):
        start, size = chance.randrange(len(content)), chance.randrange(20_000)
        file.seek(start)
        assert file.read(size) == content[start : start + size]
        assert file.tell() == min(start + size, len(content))


def test_a_image_in_a_tar_is_found_read_and_missed(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(encoded, format="PNG")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo("x/red.png")
        entry.size = len(encoded.getvalue())
        tar.addfile(entry, io.BytesIO(encoded.getvalue()))
    image = ImageRef(path=str(tmp_path / "a.tar.gz"), member="x/red.png", origin="row 3")
    assert image.exists() and image.load().size == (20, 10)
    gone = ImageRef(path=str(tmp_path / "a.tar.gz"), member="x/blue.png", origin="row 4")
    assert not gone.exists()
    with pytest.raises(UserError, match=r"row 4: .*a\.tar\.gz:x/blue\.png: not in the archive"):
        gone.load()


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_a_damaged_or_missing_archive_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: .* not found"):
        members(tmp_path / name)
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 3])
    with pytest.raises(UserError, match=f"{name}.*download it again"):
        for member in CONTENT:
            read_member(path, member)


def test_forked_processes_share_the_index_and_the_open_file_of_a_zip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.zip")
    opened: list[Path] = []
    zip_file = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda path: opened.append(path) or zip_file(path))
    assert ImageRef(str(path), next(iter(CONTENT))).exists() and not ImageRef(str(path), "none").exists()
    fork = multiprocessing.get_context("fork")
    pipes = []
    for seed in range(3):
        ours, theirs = fork.Pipe()
        fork.Process(target=read_all, args=(path, seed, opened, theirs)).start()
        pipes.append(ours)
    assert [pipe.recv() for pipe in pipes] == [(True, 1)] * 3


def read_all(path: Path, seed: int, opened: list[Path], answer: Connection) -> None:
    names = random.Random(seed).sample(list(CONTENT), len(CONTENT)) * 5
    answer.send((all(read_member(path, name) == CONTENT[name] for name in names), len(opened)))


def test_the_index_of_a_zip_takes_less_than_120_bytes_a_member(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(2000):
            archive.writestr(f"train/{i:012d}.jpg", b"x")
    index = SharedZip.of(str(path))
    assert index is not None and index.read("train/000000000123.jpg") == b"x"
    assert sum(value.nbytes for value in (index._ends, index._facts)) + len(index._names) < 120 * 2000


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_of_a_rare_method_is_read_by_the_standard_library(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("a", b"content" * 99)
    assert read_member(tmp_path / "a.zip", "a") == b"content" * 99


@pytest.mark.parametrize("damage", ["header", "content"])
def test_a_damaged_member_of_a_zip_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"content" * 99)
        archive.writestr("b", b"x")
    place = {"header": 1, "content": 60}[damage]
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.zip:a: the archive is damaged"):
        read_member(path, "a")
    assert read_member(path, "b") == b"x"


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def zipped(path: Path, **contents: bytes) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path.read_bytes()


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz"])
def test_hidden_members_and_those_of_macos_are_no_inputs_and_the_ending_may_be_in_capitals(
    tmp_path: Path, ending: str
) -> None:
    names = ["a.png", "__MACOSX/._a.png", "x/._b.png", ".cache/c.png", "./x/d.png"]
    path = tmp_path / f"photos{ending.upper()}"
    if ending == ".zip":
        zipped(path, **{name: png() for name in names})
    else:
        with tarfile.open(path, "w:gz" if ending.endswith("gz") else "w") as tar:
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size = len(png())
                tar.addfile(entry, io.BytesIO(png()))
    records = list(open_source(path))
    assert sorted(Path(record.key).name for record in records) == ["a.png", "d.png"]
    assert all(record.item and record.item.images[0].load().size == (8, 8) for record in records)


@pytest.mark.parametrize(("local", "central", "value", "words"), [(6, 8, 1, "encrypted"), (8, 10, 93, "not supported")])
def test_a_member_that_zipfile_cannot_unpack_is_one_line(
    tmp_path: Path, local: int, central: int, value: int, words: str
) -> None:
    content = bytearray(zipped(tmp_path / "a.zip", **{"a.png": png()}))
    content[local] = value
    content[content.index(b"PK\x01\x02") + central] = value
    (tmp_path / "b.zip").write_bytes(content)
    with pytest.raises(UserError, match=rf"b\.zip:a\.png: cannot be read \(.*{words}.*\); unpack the archive") as error:
        ImageRef(str(tmp_path / "b.zip"), "a.png").load()
    assert "\n" not in str(error.value)
