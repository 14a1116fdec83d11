"""The documentation site builds strictly, fetches nothing, and every command on its pages is accepted by the parser."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from vlm2vec.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND: Any = typer.main.get_command(app)
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]


def commands(page: Path) -> list[str]:
    """Every `vlm2vec …` line of a page's shell blocks; a line that ends in a backslash goes on."""
    found = []
    for block in re.findall(r"```(?:bash|console|sh)\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.removeprefix("$ ").strip()
            found += [words] if re.match(r"(\w+=\S+ )*vlm2vec ", words) else []
    return found


def parse(line: str) -> None:
    """Parses a command as the terminal would, without running it."""
    words = shlex.split(line, comments=True)
    words = words[words.index("vlm2vec") + 1 :]
    words = words[: next((i for i, word in enumerate(words) if word in {"|", "&", "&&", ">", ";"}), None)]
    with COMMAND.make_context("vlm2vec", words, resilient_parsing=False) as context:
        command: Any = context.command
        rest = [*context._protected_args, *context.args]
        while hasattr(command, "commands") and rest:
            name, command, rest = command.resolve_command(context, rest)
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_every_command_of_a_page_is_accepted_by_the_parser(page: Path) -> None:
    refused = {}
    for line in commands(page):
        try:
            parse(line)
        except typer.Exit:
            continue  # --help and --version end here
        except USAGE_ERROR as error:
            refused[line] = error.format_message()
    assert not refused


def test_the_parser_check_finds_an_unknown_option() -> None:
    with pytest.raises(USAGE_ERROR, match="--no-such-option"):
        parse("vlm2vec search hello --no-such-option 3")


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    loads = re.compile(r"<(?:script|img|iframe|link)[^>]+(?:src|href)=\"?(https?://[^\" >]+)")
    outside = {url for page in (tmp_path / "site").rglob("*.html") for url in loads.findall(page.read_text())}
    assert not outside
    assert "vlm2vec search" in (tmp_path / "site/reference/cli.html").read_text()
    assert "train.batch_size" in (tmp_path / "site/reference/recipe.html").read_text()
    assert "embedding_cache.py" in (tmp_path / "site/explain/files.html").read_text()
