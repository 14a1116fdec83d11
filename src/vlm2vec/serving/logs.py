"""One JSON object a line on standard error: what happened, never what was in it."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

logger = logging.getLogger("vlm2vec.serving")


class JsonLines(logging.Formatter):
    """A record and its `fields` as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; tracebacks are left out, they may quote inputs."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        about = {"time": f"{stamp}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "pid": record.process}
        return json.dumps(about | {"event": record.getMessage()} | getattr(record, "fields", {}))


def log_to_stderr() -> None:
    """Sends this server's lines, and uvicorn's, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("vlm2vec.serving", "uvicorn"):
        named = logging.getLogger(name)
        named.handlers, named.propagate = [handler], False
        named.setLevel(logging.INFO)
    for name in ("uvicorn.error", "uvicorn.access"):  # an access line holds the query, which may hold anything
        logging.getLogger(name).handlers = []
    logging.getLogger("uvicorn.access").propagate = False


def log_request(
    identity: str, method: str, path: str, status: int, seconds: float, caller: str | None, facts: dict[str, Any]
) -> None:
    """One request."""
    about = {"id": identity, "method": method, "path": path, "status": status, "ms": round(seconds * 1000, 1)}
    logger.info("request", extra={"fields": about | ({"caller": caller} if caller else {}) | facts})
