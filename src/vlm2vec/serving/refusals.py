"""Refusals of a request or of one input: HTTP status, error code and message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STATUS_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "too_large_error",
    415: "invalid_request_error",
    422: "unprocessable_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


@dataclass(eq=False)
class Refusal(Exception):
    """A refused request or input.

    Attributes:
        status: HTTP status of the response.
        code: Error code for programs, such as `bad_image`.
        message: Message for people. It never contains a path of the server or a stack trace.
        retry_after: Seconds after which the client may retry.
        index: Position of the input in its request.
        param: Name of the wrong field, where it is not an input.
        details: All refused inputs of the request.
    """

    status: int
    code: str
    message: str
    retry_after: int | None = None
    index: int | None = None
    param: str | None = None
    details: tuple[dict[str, Any], ...] = ()

    def body(self) -> dict[str, Any]:
        """The response body, in OpenAI's error format."""
        param = self.param if self.index is None else f"input[{self.index}]"
        error = {
            "message": self.message,
            "type": STATUS_TYPES.get(self.status, "server_error"),
            "param": param,
            "code": self.code,
        }
        return {"error": {**error, "details": list(self.details)} if self.details else error}

    def headers(self) -> dict[str, str]:
        """The `Retry-After` header, if the refusal has one."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def detail(self, index: int) -> dict[str, Any]:
        """The refusal as an entry of the request's error list."""
        return {"index": index, "code": self.code, "message": self.message}


def refuse_request(refused: dict[int, Refusal]) -> Refusal:
    """Refuse a request because of its inputs: the status of the first refused input, all of them as details."""
    first = min(refused)
    cause = refused[first]
    more = f" (and {len(refused) - 1} more inputs)" if len(refused) > 1 else ""
    details = tuple(refused[index].detail(index) for index in sorted(refused))
    return Refusal(
        cause.status, cause.code, f"input {first}: {cause.message}{more}", cause.retry_after, first, details=details
    )
