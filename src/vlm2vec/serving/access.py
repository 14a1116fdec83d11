"""Who may ask, and how often: API keys and a bucket of requests for each."""

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
    """The keys of a file, kept as digests.

    Args:
        path: One key a line; empty lines and lines that begin with # are left out. None: no key is asked for.

    Raises:
        UserError: for a file that is missing or holds no key.
    """

    def __init__(self, path: Path | None) -> None:
        self._digests: list[bytes] | None = None
        if path is None:
            return
        try:
            lines = [line.strip() for line in path.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {path}: cannot be read ({error}); expected one key a line") from error
        self._digests = [_digest(line.encode()) for line in lines if line and not line.startswith("#")]
        if not self._digests:
            raise UserError(f"--api-key-file {path}: holds no key; expected one key a line")

    def caller(self, authorization: bytes, address: str) -> str | None:
        """A name for who asks, fit for logs: the key's number, or the address; None: not allowed."""
        if self._digests is None:
            return address
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        # Every key is compared, in constant time: neither time nor the early end tells anything.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return f"key {matches.index(True) + 1}" if any(matches) and scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class RateLimit:
    """A bucket of requests for each caller: it holds a minute's worth and refills steadily.

    Args:
        per_minute: Requests a minute; 0: no limit.
        now: A clock.
    """

    def __init__(self, per_minute: float, now: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._most = per_minute / 60.0, max(1.0, per_minute)
        self._now = now
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> None:
        """Counts one request.

        Raises:
            Refusal: 429, if the caller's bucket is empty.
        """
        if not self._per_second:
            return
        now = self._now()
        left, then = self._buckets.pop(caller, (self._most, now))
        left = min(self._most, left + (now - then) * self._per_second)
        allowed = left >= 1.0
        self._buckets[caller] = (left - 1.0 if allowed else left, now)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        if not allowed:
            seconds = max(1, math.ceil((1.0 - left) / self._per_second))
            raise Refusal(429, "rate_limited", "too many requests; try again later", retry_after=seconds)
