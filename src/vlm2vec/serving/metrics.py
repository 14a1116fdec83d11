"""Prometheus metrics. Several workers are summed through files in `PROMETHEUS_MULTIPROC_DIR`."""

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
        self._requests = Counter("vlm2vec_requests_total", "Number of requests.", ("path", "status"), **within)
        self._seconds = Histogram(
            "vlm2vec_request_seconds", "Duration of a request in seconds.", ("path",), buckets=SECONDS, **within
        )
        self._batch_inputs = Histogram(
            "vlm2vec_batch_inputs", "Number of inputs in a forward pass.", buckets=SIZES, **within
        )
        self._batch_tokens = Histogram(
            "vlm2vec_batch_tokens", "Number of tokens in a forward pass.", buckets=TOKENS, **within
        )
        self._batch_seconds = Histogram(
            "vlm2vec_batch_seconds", "Duration of a forward pass in seconds.", buckets=SECONDS, **within
        )
        self._cache = Counter("vlm2vec_result_cache_total", "Lookups in the result cache.", ("hit",), **within)
        self._refused = Counter("vlm2vec_refused_inputs_total", "Number of refused inputs.", ("code",), **within)
        self._waiting = Gauge(
            "vlm2vec_waiting_inputs",
            "Number of inputs that are queued or running.",
            multiprocess_mode="livesum",
            **within,
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        """Record an answered request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, num_inputs: int, num_tokens: int, seconds: float) -> None:
        """Record a forward pass."""
        self._batch_inputs.observe(num_inputs)
        self._batch_tokens.observe(num_tokens)
        self._batch_seconds.observe(seconds)

    def cache(self, hit: bool) -> None:
        """Record a lookup in the result cache."""
        self._cache.labels(str(hit).lower()).inc()

    def refused(self, code: str) -> None:
        """Record a refused input."""
        self._refused.labels(code).inc()

    def waiting(self, more: int) -> None:
        """Record a change of the number of queued and running inputs."""
        self._waiting.inc(more)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format, summed over all workers."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        combined = CollectorRegistry()
        multiprocess.MultiProcessCollector(combined)  # type: ignore[no-untyped-call]
        return generate_latest(combined)
