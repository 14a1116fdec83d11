"""The pipeline of `Embedder.encode`: vectors of any number of inputs, in input order, in constant memory.

The inputs are processed in windows. In a window, equal inputs (by content) become one row, and rows are sorted by an
estimate of their tokens. Workers read, decode and preprocess them in that order, slightly ahead of the model. Batches
are then formed by exact token counts, visual tokens included, texts and images together. Batches depend on the inputs
only, never on timing, so encoding the same inputs again gives bitwise equal vectors.

Workers are threads: decoders, resizing, hashes and tokenizers release the GIL.

Shapes: N inputs, D embedding dim.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from vlm2vec.batch import Batch, cut_by_tokens
from vlm2vec.errors import UserError
from vlm2vec.media.text import require_unicode
from vlm2vec.models.device import is_device_broken
from vlm2vec.models.encoding.settings import EncodeSettings, EncodingModel
from vlm2vec.types import EmbeddingInput, Media, by_content, content_key

T = TypeVar("T")
R = TypeVar("R")
WINDOW = 2048
GROUP = 8  # inputs that a worker prepares at once
GROUP_TOKENS = 2048
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
POOL_BATCHES = 4  # rows of this many batches wait before batches are cut from them
POOL_BYTES = 256 << 20
RECENT_BYTES = 64 << 20
USUAL_TOKENS = (0.25, 256.0)  # per character, per image; until calibrated


@dataclass(frozen=True)
class Encoded:
    """Vectors of consecutive inputs.

    Attributes:
        begin: Position of the first input.
        vectors: Unit-norm vectors [n, D]. Rows of inputs that failed are zeros.
        bad: Rows of inputs that failed.
    """

    begin: int
    vectors: np.ndarray
    bad: list[int]


@dataclass(frozen=True)
class _Row:
    """One distinct input, prepared as a batch of one."""

    key: bytes
    batch: Batch
    tokens: int


class Pipeline:
    """Encodes one sequence of inputs. Make a new one for each sequence.

    Args:
        embedder: Set to evaluation mode while it encodes.
        settings: See `Embedder.encode`.
    """

    def __init__(self, embedder: EncodingModel, settings: EncodeSettings) -> None:
        if settings.truncate_dim is not None and settings.truncate_dim > embedder.embedding_dim:
            raise UserError(f"truncate_dim={settings.truncate_dim}: expected 1 to {embedder.embedding_dim}")
        self.embedder, self.settings = embedder, settings
        self.dim = settings.truncate_dim or embedder.embedding_dim
        self.budget = settings.batch_tokens or BATCH_TOKENS.get(embedder.device.type, BATCH_TOKENS["cuda"])
        self.workers = settings.workers or min(16, max(2, os.cpu_count() or 2))
        if embedder.device.type == "cuda":
            embedder.backbone.send_bytes()  # a quarter of what is joined and copied to the GPU
        if embedder.backbone.vision_cache is not None:
            self.workers = 1  # which images the cache encodes together must not depend on timing
        self._recent: dict[bytes, np.ndarray] = {}
        self._per_character, self._per_image = USUAL_TOKENS
        self._calibrated = False

    def stream(self, inputs: Iterable[Any]) -> Iterator[Encoded]:
        """Vectors of consecutive inputs, in order.

        Raises:
            UserError: for the first bad input, if the settings have no `on_error`.
        """
        iterator, begin = iter(inputs), 0
        executor = ThreadPoolExecutor(self.workers, thread_name_prefix="vlm2vec-prepare")
        try:
            while part := list(islice(iterator, WINDOW)):
                was_training = self.embedder.training
                self.embedder.eval()  # workers run parts of the model as well
                try:
                    encoded = self._window(part, begin, executor)
                finally:
                    self.embedder.train(was_training)
                yield encoded
                begin += len(part)
        finally:
            executor.shutdown(cancel_futures=True)

    def _window(self, values: Sequence[Any], begin: int, executor: ThreadPoolExecutor) -> Encoded:
        bad: list[int] = []
        items: dict[bytes, EmbeddingInput] = {}
        places: dict[bytes, list[int]] = {}
        for place, (item, key) in enumerate(self._keyed(values, executor)):
            if isinstance(key, UserError):
                bad += self._fail(begin, [place], key)
            else:
                items.setdefault(key, item)
                places.setdefault(key, []).append(place)
        vectors_ND = np.zeros((len(values), self.dim), np.float32)
        missing = {}
        for key, item in items.items():
            if key in self._recent:
                vectors_ND[places[key]] = self._recent[key]
                self._report(len(places[key]))
            else:
                missing[key] = item
        for key, result in self._encode(missing, executor):
            if isinstance(result, UserError):
                bad += self._fail(begin, places[key], result)
            else:
                vectors_ND[places[key]] = result
                self._remember(key, result)
                self._report(len(places[key]))
        return Encoded(begin, vectors_ND, bad)

    def _report(self, done: int) -> None:
        if self.settings.progress is not None:
            self.settings.progress(done)

    def _fail(self, begin: int, rows: list[int], error: UserError) -> list[int]:
        if self.settings.on_error is None:
            raise error
        for row in rows:
            self.settings.on_error(begin + row, error)
        self._report(len(rows))
        return rows

    def _remember(self, key: bytes, vector: np.ndarray) -> None:
        """Keeps a vector for equal inputs in later windows. Beyond `RECENT_BYTES` the oldest are dropped."""
        if len(self._recent) * vector.nbytes >= RECENT_BYTES:
            del self._recent[next(iter(self._recent))]
        self._recent[key] = vector

    def _keyed(self, values: Sequence[Any], executor: ThreadPoolExecutor) -> Iterator[tuple[Any, bytes | UserError]]:
        """Each value as an input with its key, or the error that it causes."""
        digests: dict[Media, bytes] = {}

        def digest(media: Media) -> bytes:
            if media not in digests:
                digests[media] = by_content(media)
            return digests[media]

        def keyed(part: Sequence[Any]) -> list[tuple[Any, bytes | UserError]]:
            found: list[tuple[Any, bytes | UserError]] = []
            for value in part:
                try:
                    item = EmbeddingInput.of(value, self.settings.instruction)
                    for text in (item.text, item.instruction):  # tokenizers name their own types instead
                        require_unicode(text, "input")
                    found.append((item, content_key(item, digest)))
                except Exception as error:  # noqa: BLE001 - whatever one input causes is an error of that input
                    found.append((None, _as_user_error(value, error)))
            return found

        parts = [values[start : start + GROUP] for start in range(0, len(values), GROUP)]
        for found in _ahead(executor, keyed, parts, 4 * self.workers):
            yield from found

    def _encode(
        self, items: dict[bytes, EmbeddingInput], executor: ThreadPoolExecutor
    ) -> Iterator[tuple[bytes, np.ndarray | UserError]]:
        """Vectors of distinct inputs in the order of their batches."""
        groups = self._groups(items)
        waiting: list[_Row] = []
        num_bytes = num_tokens = 0  # of the rows that wait, counted as they come
        launched: deque[tuple[list[_Row], Any]] = deque()
        for number, prepared in enumerate(_ahead(executor, self._prepare, groups, 2 * self.workers)):
            for key, result in prepared:
                if isinstance(result, UserError):
                    yield key, result
                else:
                    self.embedder.backbone.note_truncated(result)
                    waiting.append(_Row(key, result, self.embedder.backbone.costs(result)[0]))
                    num_bytes += _size(waiting[-1:])
                    num_tokens += waiting[-1].tokens
            last = number + 1 == len(groups)
            if last or num_bytes >= POOL_BYTES or num_tokens >= POOL_BATCHES * self.budget:
                tokens = [row.tokens for row in waiting]
                cuts = cut_by_tokens(tokens, self.settings.batch_size, self.budget, self.budget // 8)
                # The last chunk may not be full: it waits for rows of similar length.
                for cut in cuts if last else cuts[:-1]:
                    rows = [waiting[i] for i in cut]
                    launched.append((rows, self._forward(rows)))
                    while len(launched) > 1:  # the GPU computes the next batch while this one is copied
                        yield from self._fetched(*launched.popleft())
                waiting = [] if last or not cuts else [waiting[i] for i in cuts[-1]]
                num_bytes, num_tokens = _size(waiting), sum(row.tokens for row in waiting)
        while launched:
            yield from self._fetched(*launched.popleft())

    def _groups(self, items: dict[bytes, EmbeddingInput]) -> list[list[tuple[bytes, EmbeddingInput]]]:
        """Inputs that a worker prepares at once, longest first."""
        if len(items) > GROUP:
            self._calibrate(list(items.values()))
        sizes = {key: self._estimate(item) for key, item in items.items()}
        groups: list[list[tuple[bytes, EmbeddingInput]]] = []
        tokens = 0.0
        for key in sorted(items, key=lambda key: -sizes[key]):  # a stable sort: ties in input order
            if not groups or len(groups[-1]) == GROUP or tokens + sizes[key] > GROUP_TOKENS:
                groups.append([])
                tokens = 0.0
            groups[-1].append((key, items[key]))
            tokens += sizes[key]
        return groups

    def _estimate(self, item: EmbeddingInput) -> float:
        characters = len(item.text or "") + len(item.instruction or "")
        return self._per_character * characters + self._per_image * self._num_images(item)

    def _num_images(self, item: EmbeddingInput) -> int:
        return len(item.images) + (self.embedder.backbone.num_frames if item.video else 0)

    def _calibrate(self, items: Sequence[EmbeddingInput]) -> None:
        """Sets the estimates of tokens per character and per image from the first text and the first image."""
        if self._calibrated:
            return
        self._calibrated = True
        for has_image in (False, True):
            item = next((item for item in items if bool(self._num_images(item)) == has_image), None)
            if item is None:
                continue
            result = self._prepare([(b"", item)])[0][1]
            if isinstance(result, UserError):
                continue
            tokens = self.embedder.backbone.costs(result)[0]
            if has_image:
                rest = self._estimate(EmbeddingInput(item.text, (), item.instruction))
                self._per_image = max(1.0, tokens - rest) / self._num_images(item)
            elif item.text:
                self._per_character = tokens / max(1, len(item.text) + len(item.instruction or ""))

    def _prepare(self, group: Sequence[tuple[bytes, EmbeddingInput]]) -> list[tuple[bytes, Batch | UserError]]:
        """Each input as a batch of one, or the error that it causes. Runs in a worker."""
        keys = [key for key, _ in group]
        try:
            return list(zip(keys, self.embedder.backbone.process_each([item for _, item in group]), strict=True))
        except Exception as error:  # processors raise anything for unusual images
            if is_device_broken(error):
                raise
            if len(group) == 1:
                return [(keys[0], _as_user_error(group[0][1], error))]
        return [result for one in group for result in self._prepare([one])]

    def _forward(self, rows: Sequence[_Row]) -> Any:
        """Vectors of a batch, on the device. A failing forward pass is repeated with halves, down to single rows."""
        try:
            return self._vectors(Batch.join([row.batch for row in rows]))
        except Exception as error:  # out of memory, or whatever a kernel raises for one row
            if is_device_broken(error):  # every later input would fail as well
                raise
            if len(rows) == 1:
                failed = UserError(f"the model cannot encode an input of {rows[0].tokens} tokens: {_reason(error)}")
                failed.__cause__ = error
                return failed
        half = len(rows) // 2
        return [(part, self._forward(part)) for part in (rows[:half], rows[half:])]

    @torch.inference_mode()
    def _vectors(self, batch: Batch) -> torch.Tensor:
        output_ND: torch.Tensor = self.embedder(batch.to(self.embedder.device))
        return F.normalize(output_ND[:, : self.dim], dim=-1) if self.settings.truncate_dim else output_ND

    def _fetched(self, rows: Sequence[_Row], output: Any) -> Iterator[tuple[bytes, np.ndarray | UserError]]:
        if isinstance(output, UserError):
            yield rows[0].key, output
        elif isinstance(output, list):
            for part in output:
                yield from self._fetched(*part)
        else:
            for row, vector in zip(rows, output.cpu().numpy(), strict=True):
                finite = bool(np.isfinite(vector).all())
                yield row.key, vector if finite else UserError("the model returned NaN or Inf for this input")


def _ahead(executor: ThreadPoolExecutor, work: Callable[[T], R], parts: Sequence[T], most: int) -> Iterator[R]:
    """Results in order, with at most `most` parts submitted ahead. A single part runs in this thread."""
    if len(parts) == 1:
        yield work(parts[0])
        return
    begun: deque[Future[R]] = deque()
    for part in parts:
        begun.append(executor.submit(work, part))
        if len(begun) >= most:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _size(rows: Sequence[_Row]) -> int:
    return sum(tensor.nbytes for row in rows for tensor in row.batch.tensors.values())


def _as_user_error(value: Any, error: Exception) -> UserError:
    """The error of one input in one line, with its text and media. The cause keeps the traceback."""
    if isinstance(error, UserError):
        return error
    parts: list[str] = [type(value).__name__]
    if isinstance(value, EmbeddingInput):
        media = [*map(str, value.images), *([str(value.video)] if value.video else [])]
        parts = [repr((value.text or "")[:60]), *media]
    failed = UserError(f"{', '.join(parts)}: cannot be processed: {_reason(error)}")
    failed.__cause__ = error
    return failed


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
