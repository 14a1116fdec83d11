"""The engine: it batches the inputs of all requests into shared forward passes and isolates bad inputs.

An input passes through two stages. A thread pool decodes images and tokenizes text, one input at a time, so that a
failure affects that input alone. One thread then runs the model on a batch: the input that has waited longest and the
inputs closest to it in length, up to a token budget. The next batch accumulates while a pass runs; no input waits for a
batch to fill.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.models.device import is_device_broken
from vlm2vec.serving.batching import Budget, Embedded, Job, Outcome, take_batch
from vlm2vec.serving.caches import ImageFeatures, result_cache
from vlm2vec.serving.guards import InputLimits
from vlm2vec.serving.logs import log_failure
from vlm2vec.serving.refusals import Refusal
from vlm2vec.serving.truncation import REFUSE, TextLimits, Truncation
from vlm2vec.types import EmbeddingInput, content_key

if TYPE_CHECKING:
    from vlm2vec.models.backbones.base import Backbone
    from vlm2vec.serving.settings import ServeSettings

FRESH_SECONDS = 5.0  # a successful forward pass within this time counts as a readiness check
PROBE_SECONDS = 5.0
ANSWER_SECONDS = 1.0  # from a broken device to the end of the process
logger = logging.getLogger("vlm2vec.serving")
PROBE = EmbeddingInput(text="ready?")


class Observer(Protocol):
    """Receives the events of the engine."""

    def batch(self, num_inputs: int, num_tokens: int, seconds: float) -> None:
        """A forward pass ended."""

    def cache(self, hit: bool) -> None:
        """The cache of results was read."""

    def refused(self, code: str) -> None:
        """An input was refused."""

    def waiting(self, more: int) -> None:
        """The number of inputs that are queued or running changed by this number."""


class Model(Protocol):
    """A model of one output row per input: an `Embedder`, or the scorer of a `Reranker`."""

    @property
    def backbone(self) -> Backbone:
        """Makes the tensors of inputs."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    @property
    def embedding_dim(self) -> int:
        """Length of an output row."""
        ...

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The output rows [B, D] of a batch."""
        ...


class Engine:
    """Embeds the inputs of concurrent requests in shared batches.

    Args:
        embedder: The model; its forward pass runs in one thread of the engine.
        settings: Budgets and limits.
        observer: Receives batches and refusals, for metrics.
    """

    def __init__(self, embedder: Model, settings: ServeSettings, observer: Observer) -> None:
        self.embedder, self.settings, self.observer = embedder, settings, observer
        self.limits = InputLimits.of(settings)
        self.text_limits = TextLimits(embedder.backbone, settings.max_tokens)
        self.budget = Budget(settings.max_batch_tokens, settings.max_batch_inputs, settings.max_padding)
        self.results = result_cache(settings.result_cache_bytes)
        backbone = embedder.backbone
        if settings.image_cache_bytes and backbone.cache_images() and backbone.vision_cache is not None:
            backbone.vision_cache = ImageFeatures(backbone.vision_cache, settings.image_cache_bytes)
        self.num_waiting = 0  # only the event loop changes it
        self.last_good = 0.0
        self._rate = 1.0  # inputs per second, smoothed
        self._ready: list[Job] = []
        self._turn = threading.Condition()
        self._closing = False
        self._freed = asyncio.Event()
        self._broken = False
        self._pool = ThreadPoolExecutor(settings.threads or torch.get_num_threads(), "prepare")
        self._forwarder = threading.Thread(target=self._forward_loop, name="forward", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the threads; results go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._forwarder.start()

    def close(self) -> None:
        """Stop the threads; queued inputs are dropped."""
        with self._turn:
            self._closing = True
            self._turn.notify()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._forwarder.is_alive():
            self._forwarder.join()

    async def embed(self, items: Sequence[EmbeddingInput | Refusal], truncation: Truncation = REFUSE) -> list[Outcome]:
        """Return a vector or a refusal for each input, in order; equal inputs are embedded once.

        Raises:
            Refusal: 429 if the queue is full, 503 if the device failed.
        """
        outcomes: dict[int, Outcome] = {}
        places: dict[bytes, list[int]] = {}
        wanted: dict[bytes, EmbeddingInput] = {}
        images = any(isinstance(item, EmbeddingInput) and item.images for item in items)
        look = await asyncio.to_thread(self._look_all, items) if images else self._look_all(items)
        for index, (item, key) in enumerate(look):
            if isinstance(item, Refusal):
                outcomes[index] = item
                continue
            key += b"" if truncation == REFUSE else f"{truncation.tokens} {truncation.side}".encode()
            kept = self.results.get(key)
            self.observer.cache(kept is not None)
            if kept is not None:
                outcomes[index] = kept
            else:
                places.setdefault(key, []).append(index)
                wanted[key] = item
        made = await self._embed_all(list(wanted.values()), truncation) if wanted else []
        for (key, indices), outcome in zip(places.items(), made, strict=True):
            if isinstance(outcome, Embedded):
                self.results.put(key, outcome)
            outcomes.update(dict.fromkeys(indices, outcome))
        for outcome in outcomes.values():
            if isinstance(outcome, Refusal):
                self.observer.refused(outcome.code)
        return [outcomes[index] for index in range(len(items))]

    def _look_all(self, items: Sequence[EmbeddingInput | Refusal]) -> list[tuple[EmbeddingInput | Refusal, bytes]]:
        return [self._look(item) for item in items]

    def _look(self, item: EmbeddingInput | Refusal) -> tuple[EmbeddingInput | Refusal, bytes]:
        """The input and its cache key, or the reason why it is refused."""
        refusal = item if isinstance(item, Refusal) else self.limits.check(item)
        if refusal is not None or isinstance(item, Refusal):
            return refusal or item, b""
        return item, content_key(item)

    async def ready(self) -> bool:
        """Whether the model works: a recent forward pass succeeded, or a new one does."""
        if self._broken:
            return False
        if time.monotonic() - self.last_good < FRESH_SECONDS:
            return True
        job = self._submit(PROBE)
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                return isinstance(await job.future, Embedded)
        except TimeoutError:
            return False

    async def _embed_all(self, items: list[EmbeddingInput], truncation: Truncation) -> list[Outcome]:
        """Embed distinct inputs: at once if the queue can hold them, else in slices, for which they wait here."""
        if self._broken:
            raise unavailable()
        size = self.settings.max_queue
        if self.num_waiting + (len(items) if len(items) <= size else 1) > size:
            seconds = max(1, min(60, round(self.num_waiting / self._rate)))
            raise Refusal(429, "queue_full", "the queue is full; try again later", retry_after=seconds)
        largest = size if len(items) <= size else max(1, size // 2)  # half of the queue stays free for other requests
        outcomes: list[Outcome] = []
        while len(outcomes) < len(items):
            while self.num_waiting >= size:
                self._freed.clear()
                await self._freed.wait()
            room = min(largest, size - self.num_waiting)
            outcomes += await self._embed_slice(items[len(outcomes) : len(outcomes) + room], truncation)
        return outcomes

    async def _embed_slice(self, items: list[EmbeddingInput], truncation: Truncation) -> list[Outcome]:
        self._count_waiting(len(items))
        jobs = [self._submit(item, truncation) for item in items]
        try:
            return await asyncio.gather(*(job.future for job in jobs))
        finally:
            self._count_waiting(-len(items))
            for job in jobs:
                job.future.cancel()  # no effect on finished jobs; drops those of a request that ended early

    def _count_waiting(self, more: int) -> None:
        self.num_waiting += more
        if more < 0:
            self._freed.set()
        self.observer.waiting(more)

    def _submit(self, item: EmbeddingInput, truncation: Truncation = REFUSE) -> Job:
        assert self._loop is not None
        job = Job(item, self._loop.create_future(), truncation)
        self._pool.submit(self._prepare, job)
        return job

    def _prepare(self, job: Job) -> None:
        """Make the tensors of one input, in a thread of the pool."""
        if job.gone:
            return
        outcome: Outcome | None = None
        try:
            prepared = self.text_limits.prepare(job.item, job.truncation)
            job.batch, job.num_tokens, job.dropped = prepared.batch, prepared.num_tokens, prepared.dropped
        except Refusal as refusal:
            outcome = refusal
        except UserError as error:
            outcome = Refusal(400, "bad_input", str(error))
        except Exception as error:  # noqa: BLE001 - decoders, tokenizers and chat templates raise any type
            log_failure("an input could not be prepared", error)
            if self._check_device(error):
                outcome = unavailable()
            else:
                outcome = Refusal(400, "bad_input", "the input cannot be processed")
        if outcome is not None:
            self._deliver([(job, outcome)])
            return
        with self._turn:
            self._ready.append(job)
            self._turn.notify()

    def _forward_loop(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._ready or self._closing)
                if self._closing:
                    return
                jobs = take_batch(self._ready, self.budget)
            if jobs:
                self._deliver(self._forward(jobs))

    def _forward(self, jobs: list[Job]) -> list[tuple[Job, Outcome]]:
        """Embed a batch; if the forward pass fails, retry each input alone."""
        since = time.monotonic()
        try:
            outcomes: list[Outcome] = list(self._vectors(jobs))
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises for one input must not end the others
            log_failure(f"a forward pass of {len(jobs)} failed", error)
            broken = self._check_device(error)
            outcomes = [unavailable() if broken else self._alone(job) for job in jobs]
        seconds = time.monotonic() - since
        if any(isinstance(outcome, Embedded) for outcome in outcomes):
            self.last_good = time.monotonic()
        self._rate = 0.9 * self._rate + 0.1 * len(jobs) / max(seconds, 1e-6)
        self.observer.batch(len(jobs), sum(job.num_tokens for job in jobs), seconds)
        return list(zip(jobs, outcomes, strict=True))

    def _alone(self, job: Job) -> Outcome:
        try:
            return self._vectors([job])[0]
        except Exception as error:  # noqa: BLE001 - as above
            log_failure("a forward pass of one failed", error)
            self._check_device(error)
        self.last_good = 0.0  # the next readiness check runs the model
        if not self._broken and job.item is not PROBE and self._works():
            return Refusal(422, "model_failed", "the model fails on this input, but works on others")
        return unavailable()

    def _check_device(self, error: Exception) -> bool:
        """Whether the device is broken: no later input can succeed, so the process ends after its last answers.

        A supervisor, such as the parent of several workers, then starts another process.
        """
        if is_device_broken(error) and not self._broken:
            self._broken = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.critical("the device is broken; the process ends", extra={"fields": {"reason": reason}})
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._loop.call_later, ANSWER_SECONDS, exit_now, reason)
        return self._broken

    def _works(self) -> bool:
        """Whether the model embeds an input that is known to be valid."""
        try:
            probe = Job(PROBE, asyncio.Future(loop=self._loop), batch=self.embedder.backbone.process([PROBE]))
            self._vectors([probe])
        except Exception as error:  # noqa: BLE001 - any failure is the answer
            log_failure("the probe failed", error)
            self._check_device(error)
            return False
        self.last_good = time.monotonic()
        return True

    @torch.inference_mode()
    def _vectors(self, jobs: list[Job]) -> list[Embedded]:
        batch = Batch.join([job.batch for job in jobs if job.batch is not None])
        vectors_BD = self.embedder(batch.to(self.embedder.device)).cpu().numpy()
        if not np.isfinite(vectors_BD).all():
            raise ArithmeticError("the vector contains NaN or Inf")
        return [
            Embedded(vector.copy(), job.num_tokens, job.dropped) for vector, job in zip(vectors_BD, jobs, strict=True)
        ]

    def _deliver(self, outcomes: list[tuple[Job, Outcome]]) -> None:
        """Hand results to the waiting requests, in the event loop's thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_resolve, outcomes)


def unavailable() -> Refusal:
    """The refusal of an input while the model does not work."""
    return Refusal(503, "model_unavailable", "the model is not working at the moment; try again later", retry_after=10)


def exit_now(reason: str) -> None:
    """End the process with its reason, without cleaning up, which a broken device could block."""
    sys.stderr.write(f"error: the device failed ({reason}); start the server again\n")
    os._exit(1)


def _resolve(outcomes: list[tuple[Job, Outcome]]) -> None:
    for job, outcome in outcomes:
        if not job.future.done():
            job.future.set_result(outcome)
