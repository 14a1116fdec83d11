"""The extras of the package: described on the installation page, and all of them in `all`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_table_of_extras_names_every_extra_and_only_those() -> None:
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| (`[^|]+) \|", (ROOT / "docs/start/installation.md").read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    assert sorted(named) == sorted(about)


def test_the_extra_all_includes_every_extra_for_users() -> None:
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def included(name: str) -> set[str]:
        inner = {part for text in about[name] if text.startswith("vlm2vec[") for part in text[8:-1].split(",")}
        return inner.union(*(included(part) for part in inner))

    assert included("all") == set(about) - {"all", "docs", "dev"}
