"""Authentication and rate limits: API keys, and a token bucket of requests for each caller."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from vlm2vec.errors import UserError
from vlm2vec.serving.refusals import Refusal

MAX_CALLERS = 10_000


class Keys:
    """The API keys of a file, held in memory as SHA-256 digests.

    Args:
        path: File with one key per line; empty lines and lines that start with # are skipped. None: no key is
            required.

    Raises:
        UserError: if the file cannot be read or contains no key.
    """

    def __init__(self, path: Path | None) -> None:
        self._digests: list[bytes] | None = None
        if path is None:
            return
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--api-key-file {path}: cannot be read ({error}); expected a file with one key per line"
            ) from error
        self._digests = [_digest(line.encode()) for line in lines if line and not line.startswith("#")]
        if not self._digests:
            raise UserError(f"--api-key-file {path}: contains no key; expected one key per line")

    def caller(self, authorization: bytes, address: str) -> str | None:
        """The caller's name for logs: the number of its key, or its address. None if its key is not valid."""
        if self._digests is None:
            return address
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        # Compare with every key in constant time, so that the response time reveals nothing about the keys.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return f"key {matches.index(True) + 1}" if any(matches) and scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class RateLimit:
    """A token bucket for each caller, which holds the requests of one minute and refills continuously.

    Args:
        per_minute: Requests per minute and caller; 0: no limit.
        now: Clock in seconds; tests replace it.
    """

    def __init__(self, per_minute: float, now: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._capacity = per_minute / 60.0, max(1.0, per_minute)
        self._now = now
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> None:
        """Count one request.

        Raises:
            Refusal: 429 if the caller's bucket is empty.
        """
        if not self._per_second:
            return
        now = self._now()
        left, then = self._buckets.pop(caller, (self._capacity, now))
        left = min(self._capacity, left + (now - then) * self._per_second)
        allowed = left >= 1.0
        self._buckets[caller] = (left - 1.0 if allowed else left, now)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        if not allowed:
            seconds = max(1, math.ceil((1.0 - left) / self._per_second))
            raise Refusal(429, "rate_limited", "too many requests; try again later", retry_after=seconds)
