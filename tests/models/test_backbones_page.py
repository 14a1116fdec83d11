from __future__ import annotations

import re
from pathlib import Path

from tiny.models import FAMILIES

from vlm2vec.models.checkpoints import known
from vlm2vec.models.registry import BACKBONES, BUILT_IN

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/backbones.md").read_text()
BACKBONE_FILES = ROOT / "src/vlm2vec/models/backbones"
EXAMPLE = BACKBONE_FILES / "mistral3.py"


def table_rows() -> list[str]:
    return [line for line in PAGE.split("## Size")[0].splitlines() if line.startswith("| `")]


def test_every_family_is_on_the_page_with_its_file():
    for family in {*FAMILIES, *BACKBONES, *BUILT_IN}:
        rows = [row for row in table_rows() if f"`{family}`" in row.split("|")[1]]
        assert len(rows) == 1, family
        path = {**BACKBONES, **BUILT_IN}.get(family, "generic:")
        file = path.partition(":")[0].removeprefix("vlm2vec.models.backbones.").replace(".", "/")
        assert f"`{file}.py`" in rows[0], family
    for name in re.findall(r"`([\w/]+\.py)`", "".join(table_rows())):
        assert (BACKBONE_FILES / name).is_file()


def test_every_known_checkpoint_is_in_the_row_of_its_family():
    for row in known.table().checkpoints:
        if not row.not_loaded:
            line = next(line for line in table_rows() if f"`{row.family}`" in line.split("|")[1])
            words = row.ids[0].partition("/")[2].lower()
            published = [name.strip().lower() for name in re.split(r",| and ", line.split("|")[-2])]
            assert any(name and words.startswith(name) for name in published), row.ids[0]


def test_a_family_costs_a_file_a_line_and_a_test_parameter():
    lines = len(EXAMPLE.read_text().splitlines())
    assert lines <= 150 and "`src/vlm2vec/models/backbones/mistral3.py`" in PAGE
    registry = (ROOT / "src/vlm2vec/models/registry.py").read_text()
    parameters = (ROOT / "tests/tiny/others.py").read_text().partition("FAMILIES = {")[2]
    quoted = [line.strip() for line in PAGE.splitlines() if line.strip().startswith('"mistral3"')]
    for line, source in zip(quoted, (registry, parameters), strict=True):
        assert line in source and source.count("mistral3") == line.count("mistral3")
    elsewhere = [path for path in (ROOT / "src").rglob("*.py") if "mistral3" in path.read_text().lower()]
    assert sorted(path.name for path in elsewhere) == ["mistral3.py", "registry.py"]
    assert re.findall(r"    def (\w+)", EXAMPLE.read_text().partition("class Mistral3(")[2]) == ["load_processor"]
