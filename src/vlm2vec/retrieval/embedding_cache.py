"""Vectors made before, by content: a killed job goes on where it stopped, and a second one encodes nothing.

A store is a folder with one folder a fingerprint (what made the vectors: weights, adapter, template, processor,
precision, versions), so vectors of another model are never mistaken for this one's. In it lie shards: `NAME.npy` with
vectors and, written last, `NAME.keys` with the SHA-256 of each input. A shard is there whole or not at all, and every
process writes shards of its own, so several may share a store and any may be killed.

Shapes: N inputs, D embedding dim.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm2vec.cache import cache_folder
from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.media.videos import VideoRef
from vlm2vec.types import EmbeddingInput, by_content, content_key

ABOUT_FILE = "about.json"
KEY_BYTES = 32
RECENT = 1 << 18
PARTIAL = ".tmp"


def default_store() -> Path:
    """Where vectors are kept between jobs."""
    return cache_folder() / "embeddings"


def fingerprint(about: Mapping[str, str]) -> str:
    """What names a folder of vectors: a hash of everything that they depend on besides the input."""
    return hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode()).hexdigest()[:16]


class InputKeys:
    """Keys of inputs: a hash of text, instruction and the content (not the place) of images and video."""

    def __init__(self) -> None:
        self._digests: dict[ImageRef | VideoRef, bytes] = {}
        self._recent: dict[int, tuple[EmbeddingInput, bytes]] = {}

    def __call__(self, item: EmbeddingInput) -> bytes:
        """The key of an input, 32 bytes.

        Raises:
            UserError: if one of its images is missing.
        """
        # Readers share one object among equal candidates; holding it keeps its identity from being used again.
        if id(item) in self._recent:
            return self._recent[id(item)][1]
        if len(self._recent) >= RECENT:
            self._recent.clear()
        key = content_key(item, self._digest)
        self._recent[id(item)] = (item, key)
        return key

    def _digest(self, image: ImageRef | VideoRef) -> bytes:
        if image not in self._digests:
            self._digests[image] = by_content(image)
        return self._digests[image]


class EmbeddingStore:
    """The vectors of one fingerprint.

    Args:
        root: Folder of all stores, made if absent.
        about: What the vectors depend on besides the input, by name; its entry "model" is what people call it.

    Attributes:
        folder: Where this fingerprint's shards are.
        notices: Plain sentences for the user: why earlier vectors cannot be used, and which files were damaged.
    """

    def __init__(self, root: Path, about: Mapping[str, str]) -> None:
        self.folder = root / fingerprint(about)
        self.notices: list[str] = []
        self._place: dict[bytes, tuple[Path, int]] = {}
        self._shards: set[Path] = set()
        self._open: dict[Path, np.ndarray] = {}
        if not self.folder.is_dir():
            self.notices += _differences(root, about)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / ABOUT_FILE).is_file():
            _write(self.folder / ABOUT_FILE, json.dumps(dict(about), indent=2).encode())
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    def __len__(self) -> int:
        return len(self._place)

    def refresh(self) -> None:
        """Looks for shards that other processes wrote since."""
        for file in sorted(self.folder.glob("*.keys")):
            if file not in self._shards:
                self._shards.add(file)
                self._register(file)

    def put(self, keys: Sequence[bytes], vectors_ND: np.ndarray) -> None:
        """Keeps vectors; once it returns, a kill cannot lose them."""
        if not keys:
            return
        shard = self.folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.npy"
        beside = shard.with_name(shard.name + PARTIAL)
        with beside.open("wb") as file:
            np.save(file, np.ascontiguousarray(vectors_ND, dtype=np.float32))
        beside.replace(shard)
        names = shard.with_suffix(".keys")
        _write(names, b"".join(keys))
        self._shards.add(names)
        self._register(names)

    def rows(self, keys: Sequence[bytes]) -> StoreRows:
        """A view of the vectors of these keys, in order; all must be there. Nothing is read yet."""
        shards: dict[Path, int] = {}
        places = [self._place[key] for key in keys]
        shard_of = np.array([shards.setdefault(shard, len(shards)) for shard, _ in places])
        return StoreRows([self._vectors(shard) for shard in shards], shard_of, np.array([row for _, row in places]))

    def _vectors(self, shard: Path) -> np.ndarray:
        if shard not in self._open:
            self._open[shard] = np.load(shard, mmap_mode="r", allow_pickle=False)
        return self._open[shard]

    def _register(self, names: Path) -> None:
        """Adds a shard's keys; one that is damaged is told, passed over and so computed again."""
        shard = names.with_suffix(".npy")
        try:
            content = names.read_bytes()
            rows = len(self._vectors(shard))
        except (OSError, ValueError, EOFError) as error:
            self.notices.append(f"{shard}: damaged ({error}); its vectors are computed again")
            return
        if len(content) != rows * KEY_BYTES:
            self.notices.append(f"{names}: has {len(content)} bytes for {rows} vectors; they are computed again")
            return
        for row in range(rows):
            self._place.setdefault(content[row * KEY_BYTES : (row + 1) * KEY_BYTES], (shard, row))


class StoreRows:
    """Vectors [N, D] that are read from the shards when they are asked for."""

    def __init__(self, shards: list[np.ndarray], shard_of: np.ndarray, row_of: np.ndarray) -> None:
        self._shards, self._shard_of, self._row_of = shards, shard_of, row_of

    def __len__(self) -> int:
        return len(self._row_of)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The vectors of a slice, a list of positions or one position."""
        shard_of, row_of = self._shard_of[rows], self._row_of[rows]
        if not np.ndim(row_of):
            return np.array(self._shards[shard_of][row_of])
        vectors = np.empty((len(row_of), self._shards[0].shape[1]), np.float32)
        for shard in np.unique(shard_of):
            mine = shard_of == shard
            vectors[mine] = self._shards[shard][row_of[mine]]
        return vectors

    def view(self, positions: Sequence[int]) -> StoreRows:
        """These rows in this order; nothing is read yet."""
        return StoreRows(self._shards, self._shard_of[positions], self._row_of[positions])


class VectorStore(Protocol):
    """What `fill` and scoring need of a store."""

    def __contains__(self, key: bytes) -> bool: ...

    def refresh(self) -> None:
        """Looks for what others wrote since."""
        ...

    def put(self, keys: Sequence[bytes], vectors_ND: np.ndarray) -> None:
        """Keeps vectors."""
        ...

    def rows(self, keys: Sequence[bytes]) -> Any:
        """Vectors that can be cut by slice or list of positions."""
        ...


class MemoryStore:
    """Vectors for the length of a job."""

    def __init__(self) -> None:
        self._vectors: dict[bytes, np.ndarray] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._vectors

    def refresh(self) -> None:
        """Nobody else writes here."""

    def put(self, keys: Sequence[bytes], vectors_ND: np.ndarray) -> None:
        """Keeps vectors."""
        self._vectors.update(zip(keys, vectors_ND, strict=True))

    def rows(self, keys: Sequence[bytes]) -> np.ndarray:
        """Vectors of these keys, [N, D]."""
        return np.stack([self._vectors[key] for key in keys])


def fill(
    store: VectorStore,
    items: Mapping[bytes, EmbeddingInput],
    encode: Callable[[list[EmbeddingInput]], np.ndarray],
    *,
    part_size: int = 512,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Encodes what a store lacks, part by part; each part is kept before the next begins.

    Parts are cut from the full list, so they (and so the vectors to the bit) do not depend on where an earlier run
    was killed nor on the number of processes.

    Args:
        store: Gets the vectors.
        items: Inputs by key, distinct.
        encode: Vectors [N, D] of inputs.
        part_size: Inputs a part: what a kill can lose.
        share: (i, n): this process takes parts i, i + n, i + 2n, …
        progress: Called with the number of inputs done since the last call, found ones included.

    Returns:
        How many inputs were encoded.
    """
    keys = list(items)
    num_encoded = 0
    for number, start in enumerate(range(0, len(keys), part_size)):
        if number % share[1] != share[0]:
            continue
        part = keys[start : start + part_size]
        if any(key not in store for key in part):
            store.refresh()
        missing = [key for key in part if key not in store]
        if missing:
            store.put(missing, encode([items[key] for key in missing]))
            num_encoded += len(missing)
        progress(len(part))
    return num_encoded


@dataclass(frozen=True)
class StoreEntry:
    """What one fingerprint holds."""

    fingerprint: str
    model: str
    num_vectors: int
    num_bytes: int
    last_used: float
    about: dict[str, str]


def list_store(root: Path) -> list[StoreEntry]:
    """Every fingerprint of a store, the latest first."""
    entries = []
    for file in root.glob(f"*/{ABOUT_FILE}"):
        sizes = [(path.stat().st_size, path.stat().st_mtime, path.suffix) for path in file.parent.iterdir()]
        about = json.loads(file.read_text())
        entries.append(
            StoreEntry(
                file.parent.name,
                about.get("model", "?"),
                sum(size // KEY_BYTES for size, _, suffix in sizes if suffix == ".keys"),
                sum(size for size, _, _ in sizes),
                max(time for _, time, _ in sizes),
                about,
            )
        )
    return sorted(entries, key=lambda entry: -entry.last_used)


def clean_store(root: Path, fingerprints: Iterable[str]) -> int:
    """Removes fingerprints, and what killed processes left half-written an hour ago or earlier; returns the bytes.

    Raises:
        UserError: for a fingerprint that is not there; nothing is removed then.
    """
    chosen = [root / name for name in fingerprints]
    for folder in chosen:
        if not (folder / ABOUT_FILE).is_file():
            known = ", ".join(entry.fingerprint for entry in list_store(root)) or "none"
            raise UserError(f"{folder.name}: no such fingerprint in {root}; there are: {known}")
    freed = 0
    for folder in chosen:
        freed += sum(path.stat().st_size for path in folder.iterdir())
        shutil.rmtree(folder)
    for path in root.glob(f"*/*{PARTIAL}"):
        if path.stat().st_mtime < time.time() - 3600:
            freed += path.stat().st_size
            path.unlink()
    return freed


def _differences(root: Path, about: Mapping[str, str]) -> list[str]:
    """Why the vectors of the model's latest other fingerprint are not this one's."""
    for entry in list_store(root) if root.is_dir() else []:
        if entry.model == about.get("model") and entry.num_vectors:
            names = [name for name in sorted({*about, *entry.about}) if about.get(name) != entry.about.get(name)]
            return [
                f"{entry.num_vectors} stored vectors of {entry.model} were made with another {', '.join(names)}: "
                "all are computed again"
            ]
    return []


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    beside.write_bytes(content)
    beside.replace(path)
