"""The folder of downloaded and derived files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder, created if missing.

    `$VLM2VEC_CACHE`, else `$XDG_CACHE_HOME/vlm2vec`, else `~/.cache/vlm2vec`.
    """
    chosen = os.environ.get("VLM2VEC_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm2vec"
    folder = Path(chosen) if chosen else base
    folder.mkdir(parents=True, exist_ok=True)
    return folder
