"""The commands on vector stores, with the built-in model at its smallest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from samples import COLORS, draw
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.errors import UserError

SMALL = ["--option", "num_layers=1", "--option", "visual_tokens=4", "--option", "image_size=64"]


def typed(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: str | Path) -> str:
    with pytest.raises(UserError) as error:
        CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight images and its store."""
    work = tmp_path_factory.mktemp("search")
    for i in range(8):
        color = list(COLORS)[i % 4]
        draw(work / f"photos/{color}_{i}.png", color, i)
    said = typed("index", "compact", work / "photos", "--store", work / "photos.lance", *SMALL)
    assert "8 new, 0 changed, 0 unchanged, 0 removed; 8 encoded" in said
    assert "search is exact (8 rows, fewer than 100,000)" in said
    return work


def test_a_second_index_encodes_nothing(work: Path) -> None:
    said = typed("index", "compact", work / "photos", "--store", work / "photos.lance", *SMALL)
    assert "0 new, 0 changed, 8 unchanged, 0 removed; 0 encoded" in said


def test_search_finds_a_image_by_itself_and_prints_table_json_and_page(work: Path) -> None:
    red = work / "photos/red_0.png"
    store = ["--store", work / "photos.lance"]
    hits = json.loads(typed("search", *store, "--image", red, "-k", 3, "--json"))
    assert hits[0]["key"] == str(red) and hits[0]["score"] > 0.999 and len(hits) == 3
    said = typed("search", "something red", *store, "--image", red, "--html", work / "page.html")
    assert str(red) in said and f"Page: {work}/page.html" in said
    page = (work / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 9 and 'href="photos/red_0.png"' in page
    filtered = json.loads(typed("search", "red", *store, "--where", "path LIKE '%blue%'", "--json"))
    assert {Path(hit["key"]).name for hit in filtered} == {"blue_2.png", "blue_6.png"}


def test_a_filter_that_matches_no_row_is_said_in_words_and_is_an_empty_list_in_json(work: Path) -> None:
    none = ["--store", work / "photos.lance", "--where", "width > 9999"]
    assert typed("search", "red", *none) == typed("duplicates", *none) == "No rows match\n"
    assert json.loads(typed("search", "red", *none, "--json")) == []
    labels = ["classify", work / "photos.lance", "--labels", "red,blue", "--where", "width > 9999"]
    assert typed(*labels) == "No rows match\n"


def test_classify_and_duplicates_answer_from_the_store(work: Path) -> None:
    said = typed("classify", work / "photos.lance", "--labels", "red,blue", "-o", work / "labels.jsonl")
    rows = [json.loads(line) for line in (work / "labels.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and {row["label"] for row in rows} <= {"red", "blue"}
    assert f"Labels: {work}/labels.jsonl" in said
    groups = json.loads(typed("duplicates", "--store", work / "photos.lance", "--threshold", "-1", "--json"))
    assert [len(group) for group in groups] == [8]
    said = typed("duplicates", "--store", work / "photos.lance", "--threshold", "1", "--html", work / "same.html")
    assert "0 groups" in said and "Near-duplicates" in (work / "same.html").read_text()


def test_another_model_is_refused_in_one_line(work: Path) -> None:
    said = refused("index", "compact-dual", work / "photos", "--store", work / "photos.lance")
    assert "was made with compact and cannot be used with compact-dual" in said
    said = refused("index", work / "photos", "--store", work / "photos.lance")  # no name is the default's
    assert "was made with compact and cannot be used with compact: another" in said
    other = ["--option", "num_layers=1", "--option", "visual_tokens=1", "--option", "image_size=64"]
    said = refused("index", "compact", work / "photos", "--store", work / "photos.lance", *other)
    assert "photos.lance: was made with compact and cannot be used with compact: another" in said
    assert "index into another store" in said


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["search", "dog", "--store", "{work}/none.lance"], "no such store; make it with: vlm2vec index"),
        (["search", "--store", "{work}/photos.lance"], "the query is empty"),
        (["search", "dog"], "--store is missing"),
        (["search", "dog", "--store", "{work}/photos.lance", "--where", "sky = 1"], "No field named sky"),
        (["index", "compact", "{work}/absent", "--store", "{work}/new.lance"], "no such file or folder"),
        (["index", "--store", "{work}/new.lance"], "INPUT is missing"),
        (["index", "compact", "{work}/photos", "--store", "{work}/new"], "expected FOLDER.lance or qdrant://"),
        (["classify", "{work}/photos", "--labels", "a,b", "--where", "x = 1"], "index it first"),
        (["classify", "{work}/photos.lance", "--labels", "cat"], "expected at least two"),
        (["duplicates", "--store", "{work}/photos.lance", "--threshold", "2"], "expected a cosine"),
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(work: Path, arguments: list[str], part: str) -> None:
    assert part in refused(*[argument.format(work=work) for argument in arguments])
    assert not (work / "new.lance").exists() and not (work / "none.lance").exists()
