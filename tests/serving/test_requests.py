"""Request details besides the inputs: nulls, empty turns, headers, methods; and precise error messages."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from wire import data_uri, post

from vlm2vec import Embedder
from vlm2vec.serving.app import create_app
from vlm2vec.serving.schema_base import ONLY
from vlm2vec.serving.settings import ServeSettings

TYPES = "embedding_types"  # a field of Cohere's requests, which the server honours
OPENAPI = create_app(None, ServeSettings(model="compact")).openapi()  # type: ignore[arg-type]
MINIMAL = {
    "/v1/embeddings": {"input": "a"},
    "/v2/embed": {"texts": ["a"]},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v1/similarity": {"queries": ["a"], "targets": ["b"]},
}


def optional_fields(path: str) -> list[str]:
    name = OPENAPI["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = OPENAPI["components"]["schemas"][name.rpartition("/")[2]]
    return [field for field in schema["properties"] if field not in MINIMAL[path]]


@pytest.mark.parametrize("path", MINIMAL)
def test_null_is_the_default_of_every_optional_field(client: TestClient, path: str) -> None:
    body = MINIMAL[path]
    plain = post(client, path, **body).json()
    for field in optional_fields(path):
        answer = post(client, path, **body, **{field: None})
        assert answer.status_code == 200, (field, answer.text)
        assert answer.json() | {"id": 0} == plain | {"id": 0}, field
    assert post(client, path, **body, **dict.fromkeys(optional_fields(path))).status_code == 200


def test_null_is_the_default_inside_an_input(client: TestClient, embedder: Embedder) -> None:
    answer = post(client, input=[{"text": "a", "image": None, "images": None, "instruction": None}])
    made = np.array(answer.json()["data"][0]["embedding"])
    assert made @ embedder.encode(["a"])[0] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("content", ["", None, [], [{"type": "text", "text": ""}]])
def test_an_empty_assistant_turn_changes_nothing(client: TestClient, png: bytes, content: Any) -> None:
    image = {"type": "image_url", "image_url": {"url": data_uri(png)}}
    user = {"role": "user", "content": [image, {"type": "text", "text": "in red"}]}
    plain = post(client, messages=[user]).json()
    asked = {"continue_final_message": True, "add_generation_prompt": False}
    answer = post(client, messages=[user, {"role": "assistant", "content": content}], **asked)
    assert answer.status_code == 200 and answer.json() == plain
    answer = post(client, messages=[user, {"role": "assistant", "content": "a car"}])
    assert answer.status_code == 400 and "assistant turn must be empty" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ('{"input": "a", "input": "b"}', "input"),
        ('{"input": [{"text": "a", "text": "b"}]}', "text"),
        ('{"input": "a", "model": "vlm2vec", "model": "vlm2vec"}', "model"),
        ('{"input": "a", "in\\u0070ut": "b"}', "input"),
        ('{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "role"),
    ],
)
def test_a_key_that_appears_twice_is_refused_by_name(client: TestClient, body: str, key: str) -> None:
    answer = client.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == f"the body is not valid JSON (key '{key}' appears twice)"


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "", "image/png", None])
def test_a_wrong_content_type_is_named(client: TestClient, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    answer = client.post("/v1/embeddings", content=b'{"input": "a"}', headers=headers)
    error = answer.json()["error"]
    assert answer.status_code == 415 and error["param"] == "Content-Type"
    assert error["message"] == "Content-Type: expected application/json"


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "application/vnd.api+json"])
def test_json_by_any_of_its_names_is_accepted(client: TestClient, kind: str) -> None:
    answer = client.post("/v1/embeddings", content=b'{"input": "a"}', headers={"Content-Type": kind})
    assert answer.status_code == 200


INPUT = "a string, a list of token ids, or an object with text, image or both"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an empty list": ({"input": []}, "input: the list is empty; expected at least one entry"),
    "a number": ({"input": 5}, f"input: expected {INPUT}; or a list of these"),
    "a number in a list": ({"input": ["a", 5]}, f"input[1]: expected {INPUT}"),
    "an unknown field of an input": ({"input": [{"txt": "a"}]}, "input[0].txt: unknown field"),
    "both": ({"input": "a", "messages": []}, "messages: the list is empty; expected at least one entry"),
    "nothing": ({}, "give either input or messages"),
    "a wrong word": ({"input": "a", "encoding_format": "hex"}, "encoding_format: expected 'float' or 'base64'"),
    "a wrong number": ({"input": "a", "dimensions": 0}, "dimensions: expected 1 or more"),
    "a text for a number": ({"input": "a", "dimensions": "8"}, "dimensions: expected an integer"),
    "a part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text: required field is missing",
    ),
    "an unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        "messages[0].content[0]: expected a part with type text, image_url or image",
    ),
    "an unknown role": (
        {"messages": [{"role": "tool", "content": "a"}]},
        "messages[0].role: expected 'system', 'developer', 'user' or 'assistant'",
    ),
    "a message without role": ({"messages": [{"content": "a"}]}, "messages[0].role: required field is missing"),
    "image and images": ({"input": [{"image": "a", "images": ["b"]}]}, "input[0]: give either image or images"),
    "a text for a message": ({"messages": ["a"]}, "messages[0]: expected a JSON object"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_names_the_field_and_what_was_expected(client: TestClient, name: str) -> None:
    body, message = WRONG[name]
    error = post(client, **body).json()["error"]
    assert error["message"] == message
    assert error["param"] == (message.partition(":")[0] if ":" in message else None)


def test_a_compressed_body_is_refused_by_its_header(client: TestClient) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = client.post("/v1/embeddings", content=gzip.compress(b'{"input": "a"}'), headers=headers)
    assert answer.status_code == 415 and answer.json()["error"]["param"] == "Content-Encoding"
    plain = client.post(
        "/v1/embeddings", content=b'{"input": "a"}', headers={**headers, "Content-Encoding": "identity"}
    )
    assert plain.status_code == 200


def test_a_body_in_another_encoding_and_a_wrong_method_are_the_clients_errors(client: TestClient) -> None:
    latin = '{"input": "é"}'.encode("latin-1")
    answer = client.post("/v1/embeddings", content=latin, headers={"Content-Type": "application/json"})
    assert answer.json()["error"]["message"] == "the body is not valid JSON (not valid UTF-8 at byte 11)"
    wrong = client.get("/v1/embeddings")
    assert wrong.status_code == 405 and wrong.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"a"', b"null", b"\xff", b'{"input": "a"'])
def test_a_body_that_is_no_json_object_is_named_as_such(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "image", "url", "type", "x"]), inner)
    ),
    max_leaves=6,
)
INNER = ("union[", "function-", "Object", "Request", "Part", "pydantic", "validator", "_any", "tagged", "Input should")


@settings(max_examples=60)
@given(st.sampled_from([*MINIMAL, "/v1/search"]), st.data())
def test_no_answer_holds_inner_names(client: TestClient, path: str, data: st.DataObject) -> None:
    fields = ["input", "messages", "query", "documents", "queries", "targets", "texts", "inputs", "dimensions"]
    body = data.draw(st.dictionaries(st.sampled_from(fields), JSON, max_size=4))
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code < 500
    if answer.status_code == 400:
        message = answer.json()["error"]["message"]
        assert not [word for word in INNER if word in message], message


def test_a_model_is_described_by_each_of_its_names(serving: Callable[..., TestClient]) -> None:
    client = serving(served_names=("vlm2vec", "org/name"))
    for card in client.get("/v1/models").json()["data"]:
        answer = client.get(f"/v1/models/{card['id']}")
        assert answer.status_code == 200 and answer.json() == card and card["object"] == "model"
    missing = client.get("/v1/models/gpt-5")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_health_answers_head_as_get_without_a_body(client: TestClient, path: str) -> None:
    asked, got = client.head(path), client.get(path)
    assert asked.status_code == got.status_code == 200 and asked.content == b""
    assert asked.headers["content-type"] == got.headers["content-type"]


def test_a_named_origin_may_send_the_headers_of_browser_clients(serving: Callable[..., TestClient]) -> None:
    client = serving(cors_origins=("https://app.example.org",))
    headers = {"Origin": "https://app.example.org", "Access-Control-Request-Method": "POST"}
    wanted = "authorization,content-type,x-stainless-lang"
    answer = client.options("/v1/embeddings", headers={**headers, "Access-Control-Request-Headers": wanted})
    assert answer.status_code == 200 and "x-stainless-lang" in answer.headers["access-control-allow-headers"]


@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/embeddings", field) for field in ONLY] + [("/v2/embed", field) for field in ONLY if field != TYPES],
)
def test_a_field_that_would_change_the_vector_elsewhere_is_refused(client: TestClient, path: str, field: str) -> None:
    plain = post(client, path, **MINIMAL[path]).json()
    for value in ONLY[field]:
        answer = post(client, path, **MINIMAL[path], **{field: value})
        assert answer.status_code == 200 and answer.json() | {"id": 0} == plain | {"id": 0}
    other = False if ONLY[field] == (True,) else True if ONLY[field] == (False,) else {"a": 1}
    answer = post(client, path, **MINIMAL[path], **{field: other})
    assert answer.status_code == 400 and f"{field}: this server supports" in answer.json()["error"]["message"]


@pytest.mark.parametrize("field", ["task", "input_type", "prompt_name"])
def test_the_kind_of_input_is_given_in_the_words_of_each_server(
    client: TestClient, embedder: Embedder, field: str
) -> None:
    for word, prompt in (("query", "Find it:"), ("search_document", "Keep it:"), ("passage", "Keep it:")):
        made = np.array(post(client, input="a", **{field: word}).json()["data"][0]["embedding"])
        assert made @ embedder.encode(["a"], instruction=prompt)[0] == pytest.approx(1.0, abs=1e-4)
