"""Loading prints only messages that the user can act on."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm2vec import Embedder, UserError


@pytest.mark.slow
def test_the_first_load_and_use_of_the_built_in_model_print_nothing(tmp_path: Path) -> None:
    code = 'from vlm2vec import Embedder; Embedder.from_pretrained("compact").encode(["a dog"])'
    environment = {**os.environ, "VLM2VEC_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout == "" and run.stderr == ""


def test_a_failed_load_is_an_error_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with caplog.at_level(logging.WARNING), pytest.raises(UserError):
        Embedder.from_pretrained(tmp_path)
    assert "not a known embedding model" not in caplog.text
