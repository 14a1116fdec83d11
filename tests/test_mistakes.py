"""Typical mistakes of new users: each gives one line on standard error, exit code 2, and a hint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from samples import draw

from vlm2vec.cli import run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files that are nearly right, as the working folder."""
    monkeypatch.chdir(tmp_path)
    draw(Path("photos/1.png"), "red", 0)
    Path("empty").mkdir()
    Path("empty.jsonl").write_text("\n")
    good = [{"text": f"red {i}", "image": "photos/1.png"} for i in range(4)]
    write_lines("pairs.jsonl", good)
    write_lines("few.jsonl", good[:2])
    write_lines("missing-image.jsonl", [*good, {"text": "blue", "image": "photos/2.png"}])
    write_lines("no-text.jsonl", [*good, {"text": "", "image": "photos/1.png"}])
    write_lines("odd-columns.jsonl", [{"left": "a", "right": "b"}])
    write_lines("list.jsonl", [["a", "b"]])
    Path("broken.jsonl").write_text('{"text": "a"\n')
    Path("latin.csv").write_bytes("text,image\nBär,photos/1.png\n".encode("latin-1"))
    Path("cells.csv").write_text("text,image\na, b,photos/1.png\n")
    Path("pairs.parquet").write_text("not parquet")
    Path("pairs.xlsx").write_text("x")
    recipe = {"data": {"root": "absent"}, "train": {"steps": 10}, "output": "run"}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    Path("list.yaml").write_text("- a\n- b\n")
    Path("tabs.yaml").write_text("data:\n\troot: x\n")
    Path("done").mkdir()
    Path("done/embedder.json").write_text("{}")
    Path("bench.yaml").write_text(
        yaml.safe_dump({"name": "b", "source": {"eval": "."}, "tasks": {"T": {"reader": None}}})
    )
    Path("bench-key.yaml").write_text(
        yaml.safe_dump({"name": "b", "source": {"eval": "."}, "tasks": {"T": {"readr": "records"}}})
    )
    Path("bench-data.yaml").write_text(yaml.safe_dump({"name": "b", "tasks": {"T": {"reader": "records"}}}))
    Path("bench-rows.yaml").write_text(
        yaml.safe_dump({"name": "b", "source": {"eval": "."}, "tasks": {"T": {"reader": "records"}}})
    )
    return tmp_path


def write_lines(name: str, rows: list[object]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


MISTAKES = {
    # command, what the line names, what to do next
    "no command of that name": ("trian x", "'trian'", "Did you mean 'train'"),
    "a group without its command": ("data", "Missing command", "vlm2vec data --help"),
    "an unknown option": ("train pairs.jsonl --outptu x", "--outptu", "--output"),
    "an option without its value": ("train pairs.jsonl -o", "-o", "--help"),
    "a number that is none": ("train pairs.jsonl -o run --holdout many", "--holdout", "valid number"),
    "nothing to train on": ("train", "RECIPE|DATA is missing", "--init FILE"),
    "a recipe that is not there": ("train photso", "no such recipe", "did you mean photos?"),
    "a misspelt recipe key": ("train photos train.bacth_size=3", "train.bacth_size", "did you mean train.batch_size?"),
    "a change without a value": ("train photos train.steps", "'train.steps'", "train.steps=100"),
    "a value of the wrong kind": ("train photos train.steps=many", "train.steps", "whole number"),
    "a setting out of range": ("train photos train.temperature=0", "train.temperature", "more than 0"),
    "settings that contradict": ("train photos train.steps=5", "warmup_steps 20", "must be below steps 5"),
    "a recipe that is no mapping": ("train list.yaml", "list.yaml", "expected"),
    "tabs in a recipe": ("train tabs.yaml", "tabs.yaml", "not a valid recipe"),
    "a data folder that is not there": ("train recipe.yaml", "absent", "no such data folder"),
    "a recipe file that exists": ("train --init recipe.yaml", "recipe.yaml: already exists", "choose another name"),
    "columns given for a recipe": ("train photos --query text", "--query", "for files of pairs"),
    "pairs without a folder for the run": ("train pairs.jsonl", "--output is missing", "-o runs/mine"),
    "pairs that are not there": ("train absent.jsonl -o run", "absent.jsonl", "expected a .jsonl"),
    "an Excel file": ("train pairs.xlsx -o run", "pairs.xlsx: expected a recipe", ".csv"),
    "an empty file": ("train empty.jsonl -o run", "no rows", "expected at least two pairs"),
    "too few pairs": ("train few.jsonl -o run", "2 training pairs", "expected at least 4"),
    "columns of unknown names": ("train odd-columns.jsonl -o run", "left, right", "--query COLUMN --target COLUMN"),
    "a column that is not there": ("train pairs.jsonl -o run --query txt", "'txt'", "did you mean text?"),
    "one column for both sides": (
        "train pairs.jsonl -o run --query text --target text",
        "text is both",
        "its own column",
    ),
    "an image that is not there": ("train missing-image.jsonl -o run", "line 5, image: photos/2.png", "Fix or remove"),
    "a row without text": ("train no-text.jsonl -o run", "line 5: query is empty", "Fix or remove"),
    "lists instead of objects": ("train list.jsonl -o run", "line 1", "expected an object such as"),
    "broken JSON": ("train broken.jsonl -o run", "broken.jsonl, line 1", "not valid JSON"),
    "another encoding": ("train latin.csv -o run", "latin.csv: not valid UTF-8", "save it as UTF-8"),
    "commas in a cell without quotes": ("train cells.csv -o run", "cells.csv, row 0", "quote cells that"),
    "a file that is no parquet": ("train pairs.parquet -o run", "pairs.parquet", "not a readable parquet file"),
    "a folder without images": ("train ./empty -o run", "empty: contains no images", "or a file such as pairs.jsonl"),
    "images without captions": ("train ./photos -o run", "1 images without captions", "metadata.csv"),
    "a run that is there": ("train pairs.jsonl -o done", "done: already holds a run", "--resume"),
    "an impossible share": ("train pairs.jsonl -o run --holdout 2", "--holdout 2.0", "such as 0.1"),
    "a built-in model of another name": (
        "verify compakt",
        "compakt: not a folder",
        "did you mean compact?",
    ),
    "a benchmark of another name": ("eval compact --benchmark mmeb-v4 -o scores", "mmeb-v4", "did you mean mmeb-v"),
    "a benchmark without its data": (
        "eval compact --benchmark mmeb-v1 -o scores",
        "no data folder",
        "vlm2vec data fetch mmeb-v1",
    ),
    "a task of another name": (
        "eval compact --benchmark mmeb-v1 --data . --task ImageNet1K -o scores",
        "ImageNet1K",
        "did you mean ImageNet-1K?",
    ),
    "a benchmark that scores nothing": (
        "eval compact --benchmark bench.yaml -o scores",
        "nothing to score",
        "set a reader",
    ),
    "a misspelt key of a benchmark": (
        "eval compact --benchmark bench-key.yaml -o scores",
        "tasks.0.readr",
        "did you mean reader?",
    ),
    "a benchmark that names no folder": (
        "eval compact --benchmark bench-data.yaml -o scores",
        "names no data folder",
        "--data FOLDER",
    ),
    "a benchmark whose rows are absent": (
        "eval compact --benchmark bench-rows.yaml -o scores",
        "T: not found",
        "expected a .jsonl",
    ),
    "an unknown engine": (
        "eval compact --benchmark bench-rows.yaml -o scores --engine spark",
        "--engine spark",
        "local or ray",
    ),
    "an option without an equals sign": ("verify done --option layers", "'layers'", "expected key=value"),
    "a folder that is no checkpoint": ("verify empty", "empty", "not a checkpoint"),
    "a folder that is not there": ("index fotos/ --store new.lance", "fotos", "no such file or folder"),
    "a store without its ending": ("index photos/ --store new", "new", "expected FOLDER.lance or qdrant://"),
    "no store": ("search dog", "--store is missing", "photos.lance"),
    "a store that is not there": ("search dog --store none.lance", "none.lance", "make it with: vlm2vec index"),
    "a search for nothing": ("search --store none.lance", "query is empty", "text"),
    "a search by a file that is not there": (
        "search --image cat.jpg --server http://127.0.0.1:9",
        "cat.jpg",
        "the image file is missing",
    ),
    "a server that is not running": (
        "search dog --server http://127.0.0.1:9",
        "http://127.0.0.1:9",
        "vlm2vec serve",
    ),
    "an output of unknown kind": ("embed photos/ -o vectors.txt", "vectors.txt", ".parquet"),
    "a store as a folder of photographs": ("relocate none.lance old new", "new: no such file or folder", "moved"),
    "a single label": ("classify photos/ --labels cat", "cat", "at least two"),
    "samples over own files": ("data sample photos", "photos: already exists", "choose another name"),
    "a task without its data": ("data show mmeb-v1 OK-VQA --data empty", "empty/OK-VQA", "data fetch"),
    "results that are not there": ("report absent -o report", "absent", "vlm2vec eval"),
}


@pytest.mark.parametrize(("command", "named", "following"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(
    command: str, named: str, following: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in place.rglob("*"))
    assert run(command.split()) == 2
    errors = capsys.readouterr().err.splitlines()
    lines = [line for line in errors if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0] == errors[-1]
    assert named in lines[0] and following in lines[0], lines[0]
    assert sorted(path for path in place.rglob("*")) == before, "a mistake leaves nothing behind"
