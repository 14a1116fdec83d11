"""Commands, counts and comparisons in the README are checked here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from vlm2vec.evaluation.comparison import comparison_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs/explain/results.md").read_text()


def block(language: str) -> str:
    """The first code block of a language."""
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found, language
    return found.group(1)


def test_the_library_in_ten_lines_runs_as_written(tmp_path: Path) -> None:
    from PIL import Image

    code = block("python")
    assert len(code.strip().splitlines()) <= 10
    for name in re.findall(r'"([\w-]+\.(?:jpg|png))"', code):
        Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(2, 2)" in done.stdout


def test_the_table_is_the_one_that_the_demo_printed() -> None:
    results = json.loads((ROOT / "docs/assets/demo-results.json").read_text())
    assert comparison_table(results["columns"]).markdown.split("\n\n")[0].strip() in RESULTS


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "docs"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_tree_names_every_folder_and_only_those() -> None:
    named, stack = set(), []
    for line in block("text").splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        stack[depth:] = [name]
        named.add("".join(stack).rstrip("/"))
    packages = {str(file.parent.relative_to(ROOT)) for file in (ROOT / "src/vlm2vec").rglob("__init__.py")}
    tops = {"pretraining", "recipes", "benchmarks", "docs", "deploy", "requirements", "tests"}
    assert named == packages | tops


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
