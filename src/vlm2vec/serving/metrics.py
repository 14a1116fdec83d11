"""Counts and times for Prometheus. Several workers add up through files in `PROMETHEUS_MULTIPROC_DIR`."""

from __future__ import annotations

import os
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """The metrics of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        within: Any = {"registry": self.registry}
        self._requests = Counter("vlm2vec_requests_total", "Requests answered.", ("path", "status"), **within)
        self._seconds = Histogram("vlm2vec_request_seconds", "Time of a request.", ("path",), buckets=SECONDS, **within)
        self._batch_inputs = Histogram("vlm2vec_batch_inputs", "Inputs of a forward pass.", buckets=SIZES, **within)
        self._batch_tokens = Histogram("vlm2vec_batch_tokens", "Tokens of a forward pass.", buckets=TOKENS, **within)
        self._batch_seconds = Histogram("vlm2vec_batch_seconds", "Time of a pass.", buckets=SECONDS, **within)
        self._cache = Counter("vlm2vec_result_cache_total", "Looks into the cache of vectors.", ("hit",), **within)
        self._refused = Counter("vlm2vec_refused_inputs_total", "Inputs refused.", ("code",), **within)
        self._waiting = Gauge(
            "vlm2vec_waiting_inputs", "Inputs that wait or run.", multiprocess_mode="livesum", **within
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, num_inputs: int, num_tokens: int, seconds: float) -> None:
        """A forward pass ended."""
        self._batch_inputs.observe(num_inputs)
        self._batch_tokens.observe(num_tokens)
        self._batch_seconds.observe(seconds)

    def cache(self, hit: bool) -> None:
        """The cache of vectors was asked."""
        self._cache.labels(str(hit).lower()).inc()

    def refused(self, code: str) -> None:
        """An input was refused."""
        self._refused.labels(code).inc()

    def waiting(self, num_inputs: int) -> None:
        """So many inputs wait or run."""
        self._waiting.set(num_inputs)

    def text(self) -> bytes:
        """In Prometheus' format; of all workers, where there are several."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        everyone = CollectorRegistry()
        multiprocess.MultiProcessCollector(everyone)  # type: ignore[no-untyped-call]
        return generate_latest(everyone)
