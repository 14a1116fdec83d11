"""Log lines as JSON objects on standard error. They never contain inputs."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

logger = logging.getLogger("vlm2vec.serving")


class JsonLines(logging.Formatter):
    """Formats a record and its `fields` as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a line. Tracebacks are omitted because they may quote inputs."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        about = {"time": f"{stamp}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "pid": record.process}
        return json.dumps(about | {"event": record.getMessage()} | getattr(record, "fields", {}))


def log_to_stderr() -> None:
    """Write the lines of this server and of uvicorn to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("vlm2vec.serving", "uvicorn"):
        named = logging.getLogger(name)
        named.handlers, named.propagate = [handler], False
        named.setLevel(logging.INFO)
    for name in (
        "uvicorn.error",
        "uvicorn.access",
    ):  # access lines contain the query string, which may contain anything
        logging.getLogger(name).handlers = []
    logging.getLogger("uvicorn.access").propagate = False


def log_request(
    identity: str, method: str, path: str, status: int, seconds: float, caller: str | None, facts: dict[str, Any]
) -> None:
    """Log one request."""
    about = {"id": identity, "method": method, "path": path, "status": status, "ms": round(seconds * 1000, 1)}
    logger.info("request", extra={"fields": about | ({"caller": caller} if caller else {}) | facts})


def log_failure(what: str, error: BaseException) -> None:
    """Log the type of an error and its stack frames. The message is omitted because it may quote an input."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
        trace = trace.tb_next
    logger.error(what, extra={"fields": {"error": type(error).__name__, "frames": frames[-6:]}})
