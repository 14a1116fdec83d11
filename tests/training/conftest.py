from pathlib import Path

import pytest
from tiny.fixtures import tiny_vlm  # noqa: F401


@pytest.fixture(scope="session")
def tiny_qwen2_vl(tiny_vlm) -> str:  # noqa: F811
    """Folder of a tiny random Qwen2-VL."""
    folder: Path = tiny_vlm("qwen2_vl")
    return str(folder)
