"""Commands, counts and comparisons in the README are checked here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import COMMIT, Hub, running_hub
from samples import COLORS, draw
from tiny.fixtures import tiny_vlm  # noqa: F401

from vlm2vec.cli import run
from vlm2vec.evaluation.comparison import comparison_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs/explain/architecture.md").read_text()
RESULTS = (ROOT / "docs/explain/results.md").read_text()


def block(language: str, page: str = README) -> str:
    """The first code block of a language."""
    found = re.search(rf"```{language}\n(.*?)```", page, re.DOTALL)
    assert found, language
    return found.group(1)


@pytest.mark.parametrize("page", ["README.md", "docs/start/quickstart.md"])
def test_the_first_lines_of_python_run_as_written_on_images_of_the_package(page: str, tmp_path: Path) -> None:
    code = block("python", (ROOT / page).read_text())
    assert len(code.strip().splitlines()) <= 10
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "canoes.jpg\n"


@pytest.mark.slow
def test_the_first_commands_run_as_typed_and_find_the_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = [shlex.split(line, comments=True) for line in block("bash").splitlines()]
    commands = [words[1:] for words in typed if words[0] == "vlm2vec" and words[1] != "setup"]
    assert [words[0] for words in commands] == ["data", "index", "search"]
    for words in commands:
        assert run(words) == 0, words
    best = block("text").splitlines()[1].split()
    said = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("1 "))
    assert (said[0], Path(said[2]).name) == (best[0], Path(best[2]).name)
    assert abs(float(said[1]) - float(best[1])) < 0.05  # the README's score, within the rounding of other processors


def publish_ok_vqa(hub: Hub, folder: Path) -> None:
    """OK-VQA in the published layout and size: each query is ranked against 1,000 answers of its own row."""
    answers = [f"answer {n} of {n % 7}" for n in range(1000)]
    rows = []
    for n in range(1000):
        draw(folder / f"images/OK-VQA/{n}.png", list(COLORS)[n % len(COLORS)], n)
        ask = f"<|image_1|>\nRepresent the given image with the following question: What is in image {n}?\n"
        rows.append(
            {"qry_text": ask, "qry_img_path": f"OK-VQA/{n}.png", "tgt_text": answers, "tgt_img_path": [""] * 1000}
        )
    (folder / "data/OK-VQA").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data/OK-VQA/test-00000-of-00001.parquet")
    shutil.make_archive(str(folder / "data/images"), "zip", folder / "images")
    hub.add("datasets/TIGER-Lab/MMEB-eval", folder / "data")


@pytest.mark.slow
def test_the_path_to_scores_on_mmeb_runs_as_typed_against_a_hub(
    tiny_vlm: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    commands = re.findall(r"^vlm2vec [^#\n]*", README.partition("**Reproduce VLM2Vec on MMEB**")[2], re.MULTILINE)[:3]
    with running_hub() as hub:
        hub.add("VLM2Vec/VLM2Vec-V2.0", tiny_vlm("qwen2_vl"))
        publish_ok_vqa(hub, tmp_path)
        said = []
        for words in map(shlex.split, commands):
            done = subprocess.run(
                [sys.executable, "-m", *words],
                cwd=tmp_path,
                env={**os.environ, **hub.environment(tmp_path / "cache")},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (words, done.stderr[-2000:])
            said.append(done.stdout)
    assert f"OK-VQA: TIGER-Lab/MMEB-eval@{COMMIT}" in said[0]
    results = json.loads((tmp_path / "runs/v2/results.json").read_text())
    assert results["tasks"]["OK-VQA"]["num_queries"] == 1000
    assert COMMIT in json.dumps(results) and (tmp_path / "runs/report/report.html").is_file()


def test_the_readme_is_short_and_opens_with_a_command_and_the_images_it_found() -> None:
    lines = README.splitlines()
    assert len(lines) <= 130
    found = next(number for number, line in enumerate(lines) if line.startswith("!["))
    assert lines.index("```bash") < 8 and lines.index("```text") < found < 25


def test_the_table_is_the_one_that_the_demo_printed() -> None:
    results = json.loads((ROOT / "docs/assets/demo-results.json").read_text())
    assert comparison_table(results["columns"]).markdown.split("\n\n")[0].strip() in RESULTS


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "docs"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def folders(tree: str) -> set[str]:
    named, stack = set(), []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        stack[depth:] = [name]
        named.add("".join(stack).rstrip("/"))
    return named


def test_the_trees_name_every_folder_and_only_those() -> None:
    packages = {str(file.parent.relative_to(ROOT)) for file in (ROOT / "src/vlm2vec").rglob("__init__.py")}
    tops = {"pretraining", "recipes", "examples", "benchmarks", "docs", "deploy", "requirements", "tests"}
    assert folders(block("text", ARCHITECTURE)) == packages | tops
    tree = re.search(r"```text\n(src/.*?)```", README, re.DOTALL)
    assert tree and folders(tree[1]) == {name for name in packages if name.count("/") <= 2} | tops


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
