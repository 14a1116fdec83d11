"""Identifies the files of an embedder's weights, so that hashes need not be computed again at every load.

Hashing the weights of a 7B model takes seconds. Hashes are remembered in `fingerprints.json` of the cache folder, by
path, size and modification time of every file of the checkpoint and its base, and by the settings of loading.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vlm2vec.cache import cache_folder
from vlm2vec.files import write_json

FILE = "fingerprints.json"
MAX_ENTRIES = 200
SETTLED_SECONDS = 2.0  # a file changed later than this may change again within the resolution of its time
LIBRARIES = ("vlm2vec", "torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Origin:
    """The files that weights were read from, and the state of the tensors right after loading.

    Attributes:
        key: Identifies files and settings.
        stamps: Address and version counter of each tensor. In-place changes raise the counter.
    """

    key: str
    stamps: Mapping[str, tuple[int, int]]

    @classmethod
    def of(
        cls, tensors: Mapping[str, torch.Tensor], folders: Iterable[Path], settings: Mapping[str, Any]
    ) -> Origin | None:
        """The origin of loaded tensors.

        Args:
            tensors: All weights, on their device.
            folders: The checkpoint and its base.
            settings: Everything else that decides the tensors.

        Returns:
            None if a folder is not available, a file has just been written, or tensors do not count their changes.
        """
        files: list[tuple[str, int, int]] = []
        for folder in folders:
            if not folder.is_dir():
                return None
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                stat = path.stat()
                files.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
        if not files or time.time() - max(time_ns for _, _, time_ns in files) / 1e9 < SETTLED_SECONDS:
            return None
        facts = {"files": files, "settings": settings, "libraries": {name: version(name) for name in LIBRARIES}}
        stamps = _stamps(tensors)
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
        return None if stamps is None else cls(key, stamps)

    def remembered(self, tensors: Mapping[str, torch.Tensor], compute: Callable[[], dict[str, str]]) -> dict[str, str]:
        """The remembered values of these weights; computed, and remembered, if there are none.

        Args:
            tensors: The weights now. Values of tensors that have changed since loading are computed each time.
            compute: Makes the values by name.
        """
        if _stamps(tensors) != self.stamps:
            return compute()
        path = cache_folder() / FILE
        known = _read(path)
        if self.key not in known:
            values = compute()
            newest = dict([*known.items(), (self.key, values)][-MAX_ENTRIES:])
            try:
                write_json(path, newest)
            except OSError:  # a cache folder that cannot be written to
                return values
            return values
        return known[self.key]


def folder_of(source: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: itself, or the snapshot of a hub id in the hub's cache."""
    if Path(source).exists() or source.count("/") != 1:
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return Path(source)


def _stamps(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]] | None:
    try:
        return {name: (tensor.data_ptr(), tensor._version) for name, tensor in tensors.items()}
    except (RuntimeError, NotImplementedError):  # tensors of inference mode have no counter, wrapped ones no address
        return None


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
