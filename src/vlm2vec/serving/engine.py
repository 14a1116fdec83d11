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
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from vlm2vec.errors import UserError
from vlm2vec.models.device import is_device_broken
from vlm2vec.serving.batching import Budget, Embedded, Job, Outcome, take_batch
from vlm2vec.serving.caches import LRU, ImageFeatures
from vlm2vec.serving.guards import InputLimits
from vlm2vec.serving.logs import log_failure
from vlm2vec.serving.refusals import Refusal
from vlm2vec.types import Batch, EmbeddingInput, content_key

if TYPE_CHECKING:
    from vlm2vec.models.embedder import Embedder
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

    def waiting(self, num_inputs: int) -> None:
        """The number of inputs that are queued or running changed."""


class Engine:
    """Embeds the inputs of concurrent requests in shared batches.

    Args:
        embedder: The model; its forward pass runs in one thread of the engine.
        settings: Budgets and limits.
        observer: Receives batches and refusals, for metrics.
    """

    def __init__(self, embedder: Embedder, settings: ServeSettings, observer: Observer) -> None:
        self.embedder, self.settings, self.observer = embedder, settings, observer
        self.limits = InputLimits.of(settings)
        self.budget = Budget(settings.max_batch_tokens, settings.max_batch_inputs, settings.max_padding)
        self.results: LRU[Embedded] = LRU(settings.result_cache_bytes, lambda value: value.vector.nbytes + 200)
        backbone = embedder.backbone
        if settings.image_cache_bytes and backbone.cache_images() and backbone.vision_cache is not None:
            backbone.vision_cache = ImageFeatures(backbone.vision_cache, settings.image_cache_bytes)
        self.num_waiting = 0  # only the event loop changes it
        self.last_good = 0.0
        self._rate = 1.0  # inputs per second, smoothed
        self._ready: list[Job] = []
        self._turn = threading.Condition()
        self._closing = False
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

    async def embed(self, items: Sequence[EmbeddingInput | Refusal]) -> list[Outcome]:
        """Return a vector or a refusal for each input, in order; equal inputs are embedded once.

        Raises:
            Refusal: 429 if the queue has no place for all of them.
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
            kept = self.results.get(key)
            self.observer.cache(kept is not None)
            if kept is not None:
                outcomes[index] = kept
            else:
                places.setdefault(key, []).append(index)
                wanted[key] = item
        made = await self._embed_all(list(wanted.values())) if wanted else []
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
        if time.monotonic() - self.last_good < FRESH_SECONDS:
            return True
        job = self._submit(PROBE)
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                return isinstance(await job.future, Embedded)
        except TimeoutError:
            return False

    async def _embed_all(self, items: list[EmbeddingInput]) -> list[Outcome]:
        if self.num_waiting + len(items) > self.settings.max_queue:
            seconds = max(1, min(60, round(self.num_waiting / self._rate)))
            raise Refusal(429, "queue_full", "too many inputs wait; try again later", retry_after=seconds)
        self._count_waiting(len(items))
        jobs = [self._submit(item) for item in items]
        try:
            return await asyncio.gather(*(job.future for job in jobs))
        finally:
            self._count_waiting(-len(items))
            for job in jobs:
                job.future.cancel()  # no effect on finished jobs; drops those of a request that ended early

    def _count_waiting(self, more: int) -> None:
        self.num_waiting += more
        self.observer.waiting(self.num_waiting)

    def _submit(self, item: EmbeddingInput) -> Job:
        assert self._loop is not None
        job = Job(item, self._loop.create_future())
        self._pool.submit(self._prepare, job)
        return job

    def _prepare(self, job: Job) -> None:
        """Make the tensors of one input, in a thread of the pool."""
        if job.gone:
            return
        outcome: Outcome | None = None
        try:
            with torch.inference_mode():
                job.batch = self.embedder.backbone.process([job.item])
            job.num_tokens = self.embedder.backbone.costs(job.batch)[0]
            if job.num_tokens > self.limits.max_tokens:
                outcome = Refusal(
                    413, "too_many_tokens", f"{job.num_tokens} tokens; at most {self.limits.max_tokens} are accepted"
                )
        except UserError as error:
            outcome = Refusal(400, "bad_input", str(error))
        except Exception as error:  # noqa: BLE001 - decoders, tokenizers and chat templates raise any type
            log_failure("an input could not be prepared", error)
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
            outcomes = [self._alone(job) for job in jobs]
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
        self.last_good = 0.0  # the next readiness check runs the model
        if job.item is not PROBE and self._works():
            return Refusal(422, "model_failed", "the model fails on this input, but works on others")
        return Refusal(
            503, "model_unavailable", "the model is not working at the moment; try again later", retry_after=10
        )

    def _works(self) -> bool:
        """Whether the model embeds an input that is known to be valid."""
        try:
            probe = Job(PROBE, asyncio.Future(loop=self._loop), batch=self.embedder.backbone.process([PROBE]))
            self._vectors([probe])
        except Exception as error:  # noqa: BLE001 - any failure is the answer
            log_failure("the probe failed", error)
            if is_device_broken(error):
                self._end()
            return False
        self.last_good = time.monotonic()
        return True

    def _end(self) -> None:
        """End the process once the waiting requests have their answers: no later input can succeed on this device."""
        logger.critical("the device is broken; the process ends")
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.call_later, ANSWER_SECONDS, exit_now)

    @torch.inference_mode()
    def _vectors(self, jobs: list[Job]) -> list[Embedded]:
        batch = Batch.join([job.batch for job in jobs if job.batch is not None])
        vectors_BD = self.embedder(batch.to(self.embedder.device)).cpu().numpy()
        if not np.isfinite(vectors_BD).all():
            raise ArithmeticError("the vector contains NaN or Inf")
        return [Embedded(vector.copy(), job.num_tokens) for vector, job in zip(vectors_BD, jobs, strict=True)]

    def _deliver(self, outcomes: list[tuple[Job, Outcome]]) -> None:
        """Hand results to the waiting requests, in the event loop's thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_resolve, outcomes)


def exit_now() -> None:
    """End the process without cleaning up, which a broken device could block; its supervisor starts another."""
    os._exit(1)


def _resolve(outcomes: list[tuple[Job, Outcome]]) -> None:
    for job, outcome in outcomes:
        if not job.future.done():
            job.future.set_result(outcome)
