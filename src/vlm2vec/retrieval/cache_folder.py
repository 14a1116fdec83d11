"""Manages the folder of the embedding cache: its path, listing and removing fingerprints."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vlm2vec.cache import cache_folder
from vlm2vec.errors import UserError
from vlm2vec.files import TEMPORARY

ABOUT_FILE = "about.json"
KEY_BYTES = 32
ABANDONED_SECONDS = 3600


def default_cache() -> Path:
    """Folder of the embedding cache, inside the user's cache folder."""
    return cache_folder() / "embeddings"


@dataclass(frozen=True)
class CacheEntry:
    """Summary of one fingerprint's vectors."""

    fingerprint: str
    model: str
    num_vectors: int
    num_bytes: int
    last_used: float
    about: dict[str, str]


def list_cache(root: Path) -> list[CacheEntry]:
    """Lists the fingerprints in an embedding cache, most recently used first."""
    entries = []
    for file in root.glob(f"*/{ABOUT_FILE}"):
        found = [(path.name, path.stat()) for path in file.parent.iterdir()]
        about = json.loads(file.read_text())
        entries.append(
            CacheEntry(
                file.parent.name,
                about.get("model", "?"),
                sum(stat.st_size // KEY_BYTES for name, stat in found if is_keys_file(name)),
                sum(stat.st_size for _, stat in found),
                max(stat.st_mtime for _, stat in found),
                about,
            )
        )
    return sorted(entries, key=lambda entry: -entry.last_used)


def clean_cache(root: Path, fingerprints: Iterable[str]) -> int:
    """Removes fingerprints and temporary files that killed processes left over an hour ago; returns the bytes freed.

    Raises:
        UserError: for an unknown fingerprint; nothing is removed then.
    """
    chosen = [root / name for name in fingerprints]
    for folder in chosen:
        if not (folder / ABOUT_FILE).is_file():
            known = ", ".join(entry.fingerprint for entry in list_cache(root)) or "none"
            raise UserError(f"{folder.name}: no such fingerprint in {root}; expected one of: {known}")
    freed = 0
    for folder in chosen:
        freed += sum(path.stat().st_size for path in folder.iterdir())
        shutil.rmtree(folder)
    for path in root.glob(f"*/.*{TEMPORARY}*"):
        if path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
            freed += path.stat().st_size
            path.unlink()
    return freed


def is_keys_file(name: str) -> bool:
    """Whether a file is a complete shard's list of keys; names of temporary files begin with a dot."""
    return name.endswith(".keys") and not name.startswith(".")
