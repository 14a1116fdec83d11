"""A folder of photographs, indexed and searched by the README's lines.

`VLM2VEC_PHOTOS=5000` takes so many in place of a hundred; `benchmarks/folder.py` kills the same work in the middle.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import zipfile
from pathlib import Path

import pytest
from jobs.test_search_cli import typed

from vlm2vec.retrieval.open import open_store

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data/photos-mmeb"
NUMBER = int(os.environ.get("VLM2VEC_PHOTOS", "100"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no photographs at {DATA}")


def line(page: str, verb: str, model: str) -> list[str]:
    """The words of a page's first line with this verb, by the built-in model."""
    found = re.search(rf"^vlm2vec ({verb} .*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert found, (page, verb)
    return ["compact" if word == model else word for word in shlex.split(found.group(1), comments=True)]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `photos/` and an image of it beside, `dress.jpg`."""
    (tmp_path / "photos").mkdir()
    with zipfile.ZipFile(DATA / "train/images_zip/Flickr8k.zip") as images:
        names = [name for name in images.namelist() if name.endswith(".jpg")][:NUMBER]
        assert len(names) == NUMBER
        for name in names:
            (tmp_path / "photos" / Path(name).name).write_bytes(images.read(name))
    (tmp_path / "dress.jpg").write_bytes((tmp_path / "photos" / Path(names[NUMBER // 2]).name).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_of_photographs_is_indexed_and_searched_by_the_lines_of_the_readme(work: Path) -> None:
    index = line("README.md", "index", "runs/photos")
    distinct = len({image.read_bytes() for image in Path("photos").iterdir()})  # two of 5,000 are one image
    assert f"{NUMBER} new, 0 changed, 0 unchanged, 0 removed; {distinct} encoded" in typed(*index)
    assert open_store("photos.lance").count() == NUMBER
    search = line("README.md", "search", "")
    hits = json.loads(typed(*search, "--json"))
    assert len(hits) == int(search[search.index("-k") + 1])
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    itself = json.loads(typed("search", "--image", "dress.jpg", "--store", "photos.lance", "-k", "1", "--json"))
    assert Path(itself[0]["key"]).read_bytes() == Path("dress.jpg").read_bytes() and itself[0]["score"] > 0.999
    page = next(text for text in (ROOT / "docs/guides/search.md").read_text().splitlines() if "--html" in text)
    typed(*shlex.split(page)[1:])
    assert Path("results.html").read_text().count("data:image/jpeg;base64,") == 11
    for image in sorted(Path("photos").iterdir())[:3]:
        image.unlink()
    assert f"0 new, 0 changed, {NUMBER - 3} unchanged, 3 removed; 0 encoded" in typed(*index)
