"""Embedding cache: vectors by input content, so a killed job resumes and a second job encodes nothing.

The cache is a folder with one subfolder per fingerprint. A fingerprint covers everything that made the vectors
(weights, adapter, template, processor, precision, versions), so vectors of two models never mix. A subfolder holds
shards: `NAME.npy` with vectors and, written last, `NAME.keys` with the SHA-256 of each input. A shard is complete or
absent. Each process writes its own shards, so several processes may share a cache and any of them may be killed.

The number of shards grows with the number of vectors, the number of open files does not: at most `MAX_OPEN_SHARDS`
shards are memory-mapped at a time.

Shapes: N inputs, D embedding dim.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm2vec.files import replacing, write_json
from vlm2vec.media.images import ImageRef
from vlm2vec.media.videos import VideoRef
from vlm2vec.retrieval.cache_folder import ABOUT_FILE, KEY_BYTES, is_keys_file, list_cache
from vlm2vec.types import EmbeddingInput, by_content, content_key

RECENT = 1 << 18
MAX_OPEN_SHARDS = 64


def fingerprint(about: Mapping[str, str]) -> str:
    """Name of a folder of vectors: a hash of everything they depend on besides the input."""
    return hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode()).hexdigest()[:16]


class InputKeys:
    """Keys of inputs: a hash of text, instruction and the content (not the path) of images and video."""

    def __init__(self) -> None:
        self._digests: dict[ImageRef | VideoRef, bytes] = {}
        # Readers share one object among equal candidates. Holding the objects prevents their ids from being reused.
        self._recent: dict[int, bytes] = {}
        self._held: list[EmbeddingInput] = []

    def __call__(self, item: EmbeddingInput) -> bytes:
        """The key of an input, 32 bytes.

        Raises:
            UserError: if one of its images is missing.
        """
        key = self._recent.get(id(item))
        if key is None:
            if len(self._held) >= RECENT:
                self._recent.clear()
                self._held.clear()
            key = self._recent[id(item)] = content_key(item, self._digest)
            self._held.append(item)
        return key

    def of(self, items: Sequence[EmbeddingInput]) -> list[bytes]:
        """The keys of inputs, in order; of known inputs without a call per input."""
        try:
            return list(map(self._recent.__getitem__, map(id, items)))
        except KeyError:
            return list(map(self, items))

    def _digest(self, image: ImageRef | VideoRef) -> bytes:
        if image not in self._digests:
            self._digests[image] = by_content(image)
        return self._digests[image]


class EmbeddingCache:
    """The cached vectors of one fingerprint.

    Args:
        root: Folder of the embedding cache; created if absent.
        about: What the vectors depend on besides the input, by name. The entry "model" is the name shown to the user.

    Attributes:
        folder: Folder of this fingerprint's shards.
        notices: Messages for the user: why earlier vectors cannot be used, and which files are damaged.

    Raises:
        OSError: if a file exists but cannot be read. Such a file is not treated as damaged.
    """

    def __init__(self, root: Path, about: Mapping[str, str]) -> None:
        self.folder = root / fingerprint(about)
        self.notices: list[str] = []
        self._place: dict[bytes, tuple[Path, int]] = {}
        self._shards: set[str] = set()
        self._open = _OpenShards()
        if not self.folder.is_dir():
            self.notices += _differences(root, about)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / ABOUT_FILE).is_file():
            write_json(self.folder / ABOUT_FILE, dict(about))
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    def __len__(self) -> int:
        return len(self._place)

    def refresh(self) -> None:
        """Registers shards that other processes have written since the last call."""
        names = {entry.name for entry in os.scandir(self.folder) if is_keys_file(entry.name)}
        for name in sorted(names - self._shards):
            self._shards.add(name)
            self._register(self.folder / name)

    def put(self, keys: Sequence[bytes], vectors_ND: np.ndarray) -> None:
        """Writes vectors to a new shard. Once it returns, a kill cannot lose them."""
        if not keys:
            return
        shard = self.folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.npy"
        with replacing(shard) as beside:
            np.save(beside, np.ascontiguousarray(vectors_ND, dtype=np.float32))
        names = shard.with_suffix(".keys")
        _write(names, b"".join(keys))
        self._shards.add(names.name)
        self._register(names)

    def rows(self, keys: Sequence[bytes]) -> CachedRows:
        """A view of the vectors of these keys, in order; all must be cached. Vectors are read on access."""
        shards: dict[Path, int] = {}
        places = [self._place[key] for key in keys]
        shard_of = np.array([shards.setdefault(shard, len(shards)) for shard, _ in places])
        return CachedRows(self._open, list(shards), shard_of, np.array([row for _, row in places]))

    def _register(self, names: Path) -> None:
        """Adds a shard's keys; a damaged shard is reported and skipped, so its vectors are computed again."""
        shard = names.with_suffix(".npy")
        try:
            content = names.read_bytes()
            rows = _num_rows(shard)
        except (FileNotFoundError, ValueError, EOFError) as error:
            self.notices.append(f"{shard}: damaged ({error}); its vectors are computed again")
            return
        if len(content) != rows * KEY_BYTES:
            self.notices.append(f"{names}: has {len(content)} bytes for {rows} vectors; they are computed again")
            return
        for row in range(rows):
            self._place.setdefault(content[row * KEY_BYTES : (row + 1) * KEY_BYTES], (shard, row))


class _OpenShards:
    """Memory maps of shards, the `MAX_OPEN_SHARDS` used last; a map holds one file descriptor."""

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._maps)

    def __call__(self, shard: Path) -> np.ndarray:
        """The vectors of a shard, [rows, D]."""
        if shard not in self._maps:
            while len(self._maps) >= MAX_OPEN_SHARDS:
                self._maps.popitem(last=False)
            mapped = np.load(shard, mmap_mode="r", allow_pickle=False)
            self._maps[shard] = mapped.view(np.ndarray)  # without the class's cost at every access
        self._maps.move_to_end(shard)
        return self._maps[shard]


class CachedRows:
    """Vectors [N, D] that are read from the shards on access."""

    def __init__(self, opened: _OpenShards, shards: list[Path], shard_of: np.ndarray, row_of: np.ndarray) -> None:
        self._opened, self._shards, self._shard_of, self._row_of = opened, shards, shard_of, row_of

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows in memory."""
        return len(self) * self._opened(self._shards[0]).shape[1] * 4 if len(self) else 0

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The vectors of a slice, a list of positions or one position; each shard is opened once per call."""
        shard_of, row_of = self._shard_of[rows], self._row_of[rows]
        if not np.ndim(row_of):
            return np.array(self._opened(self._shards[shard_of])[row_of])
        vectors = np.empty((len(row_of), self._opened(self._shards[0]).shape[1]), np.float32)
        order = np.argsort(shard_of, kind="stable")
        shards, begins = np.unique(shard_of[order], return_index=True)
        for shard, mine in zip(shards, np.split(order, begins[1:]), strict=True) if len(shards) else ():
            vectors[mine] = self._opened(self._shards[shard])[row_of[mine]]
        return vectors

    def view(self, positions: Sequence[int]) -> CachedRows:
        """These rows in this order; nothing is read yet."""
        return CachedRows(self._opened, self._shards, self._shard_of[positions], self._row_of[positions])


class VectorCache(Protocol):
    """What `fill` and scoring need of an embedding cache."""

    def __contains__(self, key: bytes) -> bool: ...

    def refresh(self) -> None:
        """Registers vectors that other processes have written."""
        ...

    def put(self, keys: Sequence[bytes], vectors_ND: np.ndarray) -> None:
        """Adds vectors."""
        ...

    def rows(self, keys: Sequence[bytes]) -> Any:
        """Vectors [N, D], indexed by slice or list of positions."""
        ...


class MemoryCache:
    """An embedding cache in memory, for the length of a job."""

    def __init__(self) -> None:
        self._vectors: dict[bytes, np.ndarray] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._vectors

    def refresh(self) -> None:
        """Does nothing: no other process writes here."""

    def put(self, keys: Sequence[bytes], vectors_ND: np.ndarray) -> None:
        """Adds vectors."""
        self._vectors.update(zip(keys, vectors_ND, strict=True))

    def rows(self, keys: Sequence[bytes]) -> np.ndarray:
        """Vectors of these keys, [N, D]."""
        return np.stack([self._vectors[key] for key in keys])


def fill(
    cache: VectorCache,
    items: Mapping[bytes, EmbeddingInput],
    encode: Callable[[list[EmbeddingInput]], np.ndarray],
    *,
    part_size: int = 512,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Encodes the inputs that a cache lacks, part by part; each part is written before the next one starts.

    Parts are cut from the full list, so the parts (and the vectors, bit for bit) depend neither on where an earlier run
    was killed nor on the number of processes.

    Args:
        cache: Receives the vectors.
        items: Distinct inputs by key.
        encode: Returns the vectors [N, D] of inputs.
        part_size: Inputs per part: the most that a kill can lose.
        share: (i, n): this process takes parts i, i + n, i + 2n, …
        progress: Called with the number of inputs done since the last call, cached inputs included.

    Returns:
        Number of inputs encoded.
    """
    keys = list(items)
    num_encoded = 0
    for number, start in enumerate(range(0, len(keys), part_size)):
        if number % share[1] != share[0]:
            continue
        part = keys[start : start + part_size]
        if any(key not in cache for key in part):
            cache.refresh()
        missing = [key for key in part if key not in cache]
        if missing:
            cache.put(missing, encode([items[key] for key in missing]))
            num_encoded += len(missing)
        progress(len(part))
    return num_encoded


def _differences(root: Path, about: Mapping[str, str]) -> list[str]:
    """Explains why the vectors of the same model's latest fingerprint cannot be used."""
    for entry in list_cache(root) if root.is_dir() else []:
        if entry.model == about.get("model") and entry.num_vectors:
            names = [name for name in sorted({*about, *entry.about}) if about.get(name) != entry.about.get(name)]
            return [
                f"{entry.num_vectors} cached vectors of {entry.model} were computed with another {', '.join(names)}; "
                "all are computed again"
            ]
    return []


def _num_rows(shard: Path) -> int:
    """Number of vectors in a .npy file, from its header and size.

    Raises:
        ValueError: if the file is no array of vectors, or is truncated.
    """
    with shard.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[version](file)
        expected = file.tell() + dtype.itemsize * math.prod(shape)
        size = os.fstat(file.fileno()).st_size
    if len(shape) != 2 or size != expected:
        raise ValueError(f"{size} bytes, expected {expected} for an array of shape {shape}")
    return int(shape[0])


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as beside:
        beside.write_bytes(content)
