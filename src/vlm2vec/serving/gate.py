"""Middleware for every request: API key, rate, size, timeout and disconnects; log line and metrics."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vlm2vec.serving.access import Keys, RateLimit
from vlm2vec.serving.logs import log_failure, log_request
from vlm2vec.serving.metrics import Metrics
from vlm2vec.serving.refusals import Refusal
from vlm2vec.serving.settings import ServeSettings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
OPEN_PATHS = ("/health/live", "/health/ready", "/health")
CLIENT_LEFT = 499


class Gate:
    """ASGI middleware around the application.

    Args:
        app: The application.
        settings: Limits of the server.
        metrics: Receives the count and duration of requests.
    """

    def __init__(self, app: Any, settings: ServeSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.keys, self.rate = Keys(settings.api_key_file), RateLimit(settings.rate_limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        since, identity = time.perf_counter(), uuid.uuid4().hex
        seen: dict[str, Any] = {"status": CLIENT_LEFT}

        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", identity.encode())]
            await send(message)

        scope.setdefault("state", {})
        caller = None
        try:
            caller = self._admit(scope)
            body = await self._read(scope, receive)
            if body is not None:
                await self._run(scope, body, receive, answer)
        except Refusal as refusal:
            await _send_refusal(refusal, answer)
        except Exception as error:  # noqa: BLE001 - no internal detail may reach a client
            log_failure("a request failed", error)
            if seen["status"] == CLIENT_LEFT:
                await _send_refusal(Refusal(500, "server_error", "internal server error"), answer)
        finally:
            seconds = time.perf_counter() - since
            # Use the declared path: paths that clients invent must not reach the log or become metric labels.
            path = getattr(scope.get("route"), "path", "unknown")
            self.metrics.request(path, seen["status"], seconds)
            log_request(
                identity, scope["method"], path, seen["status"], seconds, caller, scope["state"].get("facts", {})
            )

    def _admit(self, scope: Scope) -> str | None:
        """Return the name of the caller.

        Raises:
            Refusal: 401 without a valid key, 429 above the rate limit.
        """
        if scope["path"] in OPEN_PATHS:
            return None
        headers = dict(scope["headers"])
        address = scope["client"][0] if scope.get("client") else "unknown"
        caller = self.keys.caller(headers.get(b"authorization", b""), address)
        if caller is None:
            raise Refusal(
                401, "invalid_api_key", "a valid API key is required; send the header Authorization: Bearer KEY"
            )
        self.rate.take(caller)
        return caller

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Read the whole body; None if the client disconnected.

        Raises:
            Refusal: 413 if the body is too large, 408 if it arrives too slowly.
        """
        limit = self.settings.max_body_bytes
        too_large = Refusal(413, "body_too_large", f"the request body is larger than {limit} bytes")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise Refusal(
                408, "timeout", f"the request body did not arrive within {self.settings.timeout:g} seconds"
            ) from None

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application on a body that was read; cancel it when the client disconnects."""
        given = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        work, leave = asyncio.ensure_future(self.app(scope, replay, send)), asyncio.ensure_future(left())
        try:
            await asyncio.wait({work, leave}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, leave):
                task.cancel()
            await asyncio.gather(work, leave, return_exceptions=True)


async def _send_refusal(refusal: Refusal, send: Send) -> None:
    headers = {"content-type": "application/json", **refusal.headers()}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": json.dumps(refusal.body()).encode()})
