"""Request bodies in which an object has a key twice are refused: either value may be the one that was meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute

from vlm2vec.media.text import unique_keys
from vlm2vec.serving.refusals import Refusal


class StrictRequest(Request):
    """A request whose JSON body has each key once."""

    async def json(self) -> Any:
        """Parse the body.

        Raises:
            JSONDecodeError: for a body that is not JSON, a key that an object has twice, a number that is too long, or
                a nesting that is too deep; FastAPI answers with its message.
        """
        if not hasattr(self, "_json"):
            body = await self.body()
            try:
                self._json = json.loads(body, object_pairs_hook=unique_keys)
            except json.JSONDecodeError:
                raise
            except UnicodeDecodeError as error:
                raise json.JSONDecodeError(f"not valid UTF-8 at byte {error.start}", "", 0) from error
            except (ValueError, RecursionError) as error:
                raise json.JSONDecodeError(str(error).partition(";")[0], "", 0) from error
        return self._json


class StrictRoute(APIRoute):
    """A route that reads its body as a `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """The handler of FastAPI, given the strict request.

        Raises:
            Refusal: 415 for a compressed body, when the handler is called.
        """
        handle = super().get_route_handler()

        async def strict(request: Request) -> Any:
            if request.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
                message = "Content-Encoding: compressed bodies are not supported; send the body as it is"
                raise Refusal(415, "unsupported_media_type", message, param="Content-Encoding")
            return await handle(StrictRequest(request.scope, request.receive))

        return strict
