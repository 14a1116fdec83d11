"""Archives are read in place; members equal the original files."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from vlm2vec.errors import UserError
from vlm2vec.media import archives
from vlm2vec.media.archives import SeekableGzip, members, read_member
from vlm2vec.media.images import ImageRef

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
