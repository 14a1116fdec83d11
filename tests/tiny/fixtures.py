"""Session fixtures of the tiny models: import them in a conftest."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tiny.models import FAMILIES


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_vlm(family)`: the folder of a tiny model, built at the first call."""

    @cache
    def folder_of(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        FAMILIES[family].build(folder)
        return folder

    return folder_of
