"""Why a request or one of its inputs is refused, as clients see it: a status, a code and one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STATUS_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "too_large_error",
    422: "unprocessable_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


@dataclass(eq=False)
class Refusal(Exception):
    """A request or one input that is refused.

    Attributes:
        status: HTTP status of a request that ends with this.
        code: What programs look at, such as `bad_image`.
        message: What people read. It never holds a path of the server or a stack trace.
        retry_after: Seconds after which the client may try again.
        index: Position of the input in its request.
        details: All refused inputs of the request.
    """

    status: int
    code: str
    message: str
    retry_after: int | None = None
    index: int | None = None
    details: tuple[dict[str, Any], ...] = ()

    def body(self) -> dict[str, Any]:
        """The answer, in the shape of OpenAI's errors."""
        param = None if self.index is None else f"input[{self.index}]"
        error = {
            "message": self.message,
            "type": STATUS_TYPES.get(self.status, "server_error"),
            "param": param,
            "code": self.code,
        }
        return {"error": {**error, "details": list(self.details)} if self.details else error}

    def headers(self) -> dict[str, str]:
        """`Retry-After`, where there is one."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def detail(self, index: int) -> dict[str, Any]:
        """The refusal as one line of a request's list."""
        return {"index": index, "code": self.code, "message": self.message}


def refuse_request(refused: dict[int, Refusal]) -> Refusal:
    """The refusal of a whole request by its refused inputs: the first one's status, all of them as details."""
    first = min(refused)
    cause = refused[first]
    more = f" (and {len(refused) - 1} more inputs)" if len(refused) > 1 else ""
    details = tuple(refused[index].detail(index) for index in sorted(refused))
    return Refusal(cause.status, cause.code, f"input {first}: {cause.message}{more}", cause.retry_after, first, details)
