"""The demo benchmark, built from the real packages: layout, correct answers, and no leaks."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from vlm2vec.data.emoji import prepare as demo
from vlm2vec.data.emoji.tasks import CORNERS, PLACES, TONES, words
from vlm2vec.errors import UserError

TRAIN_COLUMNS = ["qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"]
KINDS = ("Name", "T2I", "Edit", "VQA", "Sheet")
EVAL_SETS = [prefix + kind for prefix in ("Emoji", "Fluent") for kind in KINDS]


class Prepared:
    """A prepared benchmark, opened for reading; images go by zip member, whichever zip holds them."""

    def __init__(self, root: Path, stages: list[tuple[str, int, int]]) -> None:
        self.root, self.stages = root, stages
        self.names = json.loads((root / "names.json").read_text())
        self.shown: dict[str, list[str]] = json.loads((root / "pictures.json").read_text())
        self.train = {f"Emoji{kind}": self._rows(f"train/Emoji{kind}/original") for kind in KINDS}
        self.eval = {name: self._rows(f"eval/{name}/test") for name in EVAL_SETS}
        self.zips = {name: zipfile.ZipFile(root / f"train/images_zip/{name}.zip") for name in self.train}
        self.zips["eval"] = zipfile.ZipFile(root / "eval/images.zip")
        self.name_of = {Path(image).stem: gold for _, image, gold, _, _ in self.questions("Name")}

    def _rows(self, stem: str) -> list[dict[str, Any]]:
        return list(pq.read_table(self.root / f"{stem}-00000-of-00001.parquet").to_pylist())

    def open(self, member: str) -> Image.Image:
        archive = self.zips[member.split("/")[0] if "/Train/" in member else "eval"]
        return Image.open(io.BytesIO(archive.read(member)))

    def questions(self, kind: str) -> Iterator[tuple[str, str, str, str, list[str]]]:
        """Query text, its image, the right answer (text, or image if there is one), wrong answer, candidates."""
        for row in self.train[f"Emoji{kind}"]:
            shown, gold = (row[key].removeprefix("images/") for key in ("qry_image_path", "pos_image_path"))
            yield row["qry"], shown, gold or row["pos_text"], row["neg_text"], []
        for name in (f"Emoji{kind}", f"Fluent{kind}"):
            for row in self.eval[name]:
                candidates = row["tgt_img_path"] if row["tgt_img_path"][0] else row["tgt_text"]
                yield row["qry_text"], row["qry_img_path"], candidates[0], "", candidates


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    """Built anew by the code under test; the packages stay in the user's cache, to be fetched only once."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: the demo benchmark's drawings are npm packages")
    cache, packages = tmp_path_factory.mktemp("demo"), Path.home() / ".cache" / "vlm2vec" / "npm"
    packages.mkdir(parents=True, exist_ok=True)
    (cache / "npm").symlink_to(packages, target_is_directory=True)
    stages: list[tuple[str, int, int]] = []
    opened = Prepared(demo.prepare_demo(cache, progress=lambda *stage: stages.append(stage)), stages)
    yield opened
    for archive in opened.zips.values():
        archive.close()


def pixels(image: Image.Image) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def cells(sheet: Image.Image) -> list[bytes]:
    boxes = [(64 * (i % 3), 64 * (i // 3), 64 * (i % 3) + 64, 64 * (i // 3) + 64) for i in range(9)]
    return [pixels(sheet.crop(box)) for box in boxes]


def test_rows_have_the_mmeb_columns_and_their_images_are_in_the_zips(prepared: Prepared) -> None:
    texts: list[tuple[str, str]] = []
    for name, rows in prepared.train.items():
        assert len(rows) >= 1000
        assert all(list(row) == TRAIN_COLUMNS and all(isinstance(row[c], str) for c in row) for row in rows)
        used = {row[key] for row in rows for key in TRAIN_COLUMNS if key.endswith("_path")} - {""}
        assert sorted(used) == sorted(f"images/{member}" for member in prepared.zips[name].namelist())
        texts += [(row["qry"], row["qry_image_path"]) for row in rows]
        texts += [(row["pos_text"], row["pos_image_path"]) for row in rows]
    rows = [row for rows in prepared.eval.values() for row in rows]
    assert all(list(row) == ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"] for row in rows)
    candidates = [pair for row in rows for pair in zip(row["tgt_text"], row["tgt_img_path"], strict=True)]
    candidates += [(row["qry_text"], row["qry_img_path"]) for row in rows]
    assert sorted({path for _, path in candidates} - {""}) == sorted(prepared.zips["eval"].namelist())
    assert all(text.count("<|image_1|>") == bool(path) for text, path in (*texts, *candidates))


def test_the_candidates_of_a_set_are_one_large_pool_without_doubles(prepared: Prepared) -> None:
    for name, rows in prepared.eval.items():
        pools = [set(zip(row["tgt_text"], row["tgt_img_path"], strict=True)) for row in rows]
        assert all(pool == pools[0] and len(pool) == len(rows[0]["tgt_text"]) for pool in pools), name
        assert 100 <= len(pools[0]) <= 240
        drawn = [pixels(prepared.open(path)) for _, path in pools[0] if path]
        assert len(set(drawn)) == len(drawn), name


def test_no_test_drawing_is_in_any_training_image(prepared: Prepared) -> None:
    trained = {key for member, keys in prepared.shown.items() if "/Train/" in member for key in keys}
    tested = {key for member, keys in prepared.shown.items() if "/Train/" not in member for key in keys}
    assert not tested & trained
    assert not [key for key in trained if key.startswith("fluent-")]
    members = prepared.zips["eval"].namelist()
    forbidden = {pixels(prepared.open(member)) for member in members if member.startswith("Emoji/")}
    for member in prepared.shown:
        # What a grid shows is scaled: it is checked by the drawings it is made of, above.
        if "/Train/" in member and "grid" not in member:
            image = prepared.open(member)
            assert (image.format, image.mode, image.size[0]) == ("PNG", "RGB", 192 if "sheet" in member else 64)
            assert forbidden.isdisjoint(cells(image) if "sheet" in member else [pixels(image)]), member


def test_no_held_out_name_is_in_any_training_text(prepared: Prepared) -> None:
    held_out = [words(name) for name in demo.held_out_names(prepared.root)]
    texts = {words(row[key]) for rows in prepared.train.values() for row in rows for key in TRAIN_COLUMNS[::2]}
    assert not [(name, text) for text in texts for name in held_out if name in text]


def test_the_names_are_many_and_lie_on_the_side_that_is_told(prepared: Prepared) -> None:
    train, ind_test, held_out = (set(prepared.names[side]) for side in ("train", "ind_test", "held_out"))
    assert len(train | held_out) >= 1100
    assert ind_test <= train - held_out == train
    assert {row["pos_text"] for row in prepared.train["EmojiName"]} == train
    assert {row["tgt_text"][0] for row in prepared.eval["EmojiName"]} <= ind_test
    assert {row["tgt_text"][0] for row in prepared.eval["FluentName"]} <= held_out
    assert 0.15 < len(held_out) / len(train | held_out) < 0.3
    for query, _, gold, _, _ in prepared.questions("T2I"):
        assert query == f"Find me an emoji that matches the given description: {prepared.name_of[Path(gold).stem]}\n"


def test_an_edit_leads_to_the_same_emoji_in_the_named_tone(prepared: Prepared) -> None:
    codes, lights = {tone: code.lower() for code, tone in TONES.items()}, defaultdict(list)
    for query, base, gold, _, candidates in prepared.questions("Edit"):
        tone = re.fullmatch(r"<\|image_1\|>\nFind .* change: with (\S+) skin tone\n", query)
        assert tone
        before, after = Path(base).stem.split("-"), Path(gold).stem.split("-")
        assert codes[tone[1]] in after
        assert [point for point in after if point != codes[tone[1]]] == before
        if candidates:  # the base and its other tones are there to be told apart
            plain = [re.sub("-1f3f[b-f]", "", path) for path in candidates]
            assert (base in candidates, plain.count(base)) == (True, 6)
            lights[before[0] == "fluent", tone[1]].append(sum(prepared.open(gold).convert("L").tobytes()))
    for fluent in (False, True):  # the tones are what they are called: one vendor's file names are not
        means = [sum(lights[fluent, tone]) for tone in list(TONES.values())[1:]]
        assert means == sorted(means, reverse=True)


def test_the_answer_to_a_question_is_where_the_question_points(prepared: Prepared) -> None:
    steps = {"left of": -1, "right of": 1, "above": -2, "below": 2}
    for query, image, gold, wrong, candidates in prepared.questions("VQA"):
        names = [prepared.name_of[key] for key in prepared.shown[image]]
        question = query.split("following question: ")[1]
        if corner := re.fullmatch(r"What is in the (.*) corner\?\n", question):
            answer = CORNERS.index(corner[1])
        else:
            beside = re.fullmatch(r"What is (left of|right of|above|below) the (.*)\?\n", question)
            assert beside
            answer = names.index(beside[2]) + steps[beside[1]]
        assert len(set(names)) == 4
        assert names[answer] == gold
        assert set(names) <= set(candidates) if candidates else wrong in set(names) - {gold}


def test_a_sheet_crop_is_the_very_cell_of_the_expression(prepared: Prepared) -> None:
    for number, (query, image, gold, _, candidates) in enumerate(prepared.questions("Sheet")):
        keys = prepared.shown[image]
        names, said = [prepared.name_of[key] for key in keys], query.split('"')[1]
        assert len(set(names)) == 9
        cell = names.index(said) if "labeled as" in query else PLACES.index(said.removeprefix("the emoji in the "))
        assert Path(gold).stem == keys[cell]
        assert not candidates or set(keys) <= {Path(path).stem for path in candidates}
        assert number % 20 or cells(prepared.open(image))[cell] == pixels(prepared.open(gold))


def test_the_task_table_counts_truly(prepared: Prepared) -> None:
    table = yaml.safe_load((prepared.root / "benchmark.yaml").read_text())
    assert (table["name"], table["source"]) == ("emoji-mmeb", {"train": "train", "eval": "eval"})
    assert [task["name"] for task in table["tasks"]] == EVAL_SETS
    for task in table["tasks"]:
        rows = prepared.eval[task["name"]]
        assert 130 <= task["num_queries"] == len(rows) <= 200
        assert {len(row["tgt_text"]) for row in rows} == {task["num_candidates"]}
        split = "ood" if task["name"].startswith("Fluent") else "ind"
        assert (task["split"], task["metric"], task["scope"]) == (split, "hit@1", "local")


def test_progress_comes_to_its_end_and_the_manifest_names_all_files_and_licences(prepared: Prepared) -> None:
    ends = {stage: done / total for stage, done, total in prepared.stages}
    assert ends == {"download": 1, "read": 1, "draw": 1}
    manifest = json.loads((prepared.root / "manifest.json").read_text())
    assert re.search("Apache-2.0.*CC-BY-4.0.*MIT", " ".join(source["licence"] for source in manifest["sources"]))
    files = {path.relative_to(prepared.root).as_posix() for path in filter(Path.is_file, prepared.root.rglob("*"))}
    assert files == {*manifest["files"], "manifest.json"}


def test_another_process_makes_the_same_bytes(prepared: Prepared, tmp_path: Path) -> None:
    program = """if True:
        import sys
        from pathlib import Path
        from vlm2vec.data.emoji import prepare as demo
        write, packages, root = demo._write_zips, Path(sys.argv[1]), Path(sys.argv[2])
        part = lambda zips: {name: dict(list(pictures.items())[-50:]) for name, pictures in zips.items()}
        demo._write_zips = lambda root, zips, *rest: write(root, part(zips), *rest)
        demo._write_benchmark(root, *demo._read_sources(packages, lambda *_: None), lambda *_: None)
    """
    environment = os.environ | {"PYTHONHASHSEED": "1234", "PYTHONPATH": os.pathsep.join(sys.path)}
    packages = str(prepared.root.parent / "npm")
    subprocess.run([sys.executable, "-c", program, packages, str(tmp_path)], check=True, env=environment)
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        whole = prepared.root / path.relative_to(tmp_path)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive, zipfile.ZipFile(whole) as other:
                assert all(archive.read(info) == other.read(info.filename) for info in archive.infolist())
                assert {info.date_time[0] for info in other.infolist()} == {1980}
        elif path.name != "manifest.json":
            assert path.read_bytes() == whole.read_bytes(), path


def test_a_sound_benchmark_is_reused_without_npm_and_a_changed_or_missing_file_is_named(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    before = (prepared.root / "manifest.json").stat()
    assert demo.prepare_demo(prepared.root.parent) == prepared.root
    assert (prepared.root / "manifest.json").stat().st_ino == before.st_ino
    demo.verify_demo(prepared.root)
    root = shutil.copytree(prepared.root, tmp_path / "copy", copy_function=os.link)
    changed = root / "eval/FluentVQA/test-00000-of-00001.parquet"
    for content, told in ((changed.read_bytes()[:-1] + b"?", "checksum"), (b"", "missing")):
        changed.unlink()
        if content:
            changed.write_bytes(content)
        with pytest.raises(UserError, match=rf"^\S*FluentVQA\S* [^\n]*{told}[^\n]*$"):
            demo.verify_demo(root)


def test_an_incomplete_folder_is_rebuilt_and_a_failed_build_changes_nothing(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(prepared.root, tmp_path / prepared.root.name, copy_function=os.link)
    (root / "names.json").unlink()

    def build(folder: Path, *_: object) -> None:
        (folder / "new").touch()
        if not (tmp_path / "ready").exists():
            raise RuntimeError("stop")

    monkeypatch.setattr(demo, "_fetch_sources", lambda *_: None)
    monkeypatch.setattr(demo, "_read_sources", lambda *_: ({}, []))
    monkeypatch.setattr(demo, "_write_benchmark", build)
    with pytest.raises(RuntimeError, match="stop"):
        demo.prepare_demo(tmp_path)
    assert (list(tmp_path.iterdir()), (root / "benchmark.yaml").is_file()) == ([root], True)
    (tmp_path / "ready").touch()
    assert demo.prepare_demo(tmp_path) == root
    assert (len(list(tmp_path.iterdir())), [path.name for path in root.iterdir()]) == (2, ["new"])


def test_without_npm_or_a_folder_to_write_to_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"^[^\n]*npm[^\n]*Install Node\.js[^\n]*$"):
        demo.prepare_demo(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: not writable[^\n]*$"):
        demo.prepare_demo(tmp_path / "file")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'npm error no such host' >&2; echo 'A complete log' >&2; exit 1", r"\(npm error no such host\)"),
        ("touch emoji-datasource-google-16.0.0.tgz", "google@16.0.0 with another SHA-512"),
    ],
)
def test_a_failing_npm_or_a_wrong_package_is_told_in_one_line(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = tmp_path / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        demo.prepare_demo(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tgz"))
