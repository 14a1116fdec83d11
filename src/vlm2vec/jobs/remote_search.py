"""Searches the vector store of a running `vlm2vec serve --store`: no model and no store are loaded here."""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.error
import urllib.request
from typing import Any

from vlm2vec.errors import UserError
from vlm2vec.jobs.searching import Query
from vlm2vec.media.images import ImageRef
from vlm2vec.retrieval.vector_store import Hit

KEY_VARIABLE = "VLM2VEC_API_KEY"
TIMEOUT = 60.0  # seconds
ERROR_BYTES = 10_000


def search_server(server: str, query: Query, k: int = 10, where: str | None = None) -> list[Hit]:
    """The k rows of the server's store that are nearest to a query, best first.

    Args:
        server: Address such as `http://127.0.0.1:8000`. If the server requires a key, it is read from the environment
            variable VLM2VEC_API_KEY.
        query: The image is sent with the request, so its file need not exist on the server.
        k: Number of results, at most 1,000.
        where: Filter on the rows.

    Raises:
        UserError: if the query is empty, the server cannot be reached, or it refuses the request.
    """
    if not server.startswith(("http://", "https://")):
        raise UserError(f"--server {server}: expected an address such as http://127.0.0.1:8000")
    item = query.as_input()
    parts = {"text": item.text, "images": [_data_uri(image) for image in item.images], "instruction": item.instruction}
    body = {"query": {name: value for name, value in parts.items() if value}, "k": k, "where": where}
    answer = _post(f"{server.rstrip('/')}/v1/search", body)
    try:
        return [Hit(row["key"], float(row["score"]), dict(row["metadata"])) for row in answer["results"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{server}: unexpected answer; expected the address of a vlm2vec serve --store") from error


def _post(url: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - http or https
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310 - http or https
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            raise UserError(f"{url}: {_message(error.read(ERROR_BYTES)) or error}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{url}: not a JSON answer; expected the address of a vlm2vec serve --store") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{url}: no answer ({reason}); start it with: vlm2vec serve MODEL --store STORE") from error


def _message(body: bytes) -> str:
    """The message of the server's error response; empty if it has none."""
    try:
        return " ".join(str(json.loads(body)["error"]["message"]).split())
    except (ValueError, KeyError, TypeError):
        return ""


def _data_uri(image: ImageRef) -> str:
    encoded = io.BytesIO()
    image.load().save(encoded, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
