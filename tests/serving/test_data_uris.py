"""Data URIs and base64 in every variant that clients send decode to the same bytes; ordinary text stays text."""

from __future__ import annotations

import base64
import textwrap
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from wire import data_uri, post

from vlm2vec import Embedder
from vlm2vec.media.data_uris import base64_bytes, data_uri_bytes, is_data_uri
from vlm2vec.media.images import ImageRef

AROUND = ["", " ", "\n", "\ufeff", "\u200b", '"', "'", "\xa0"]
HEADS = [
    "data:image/png",
    "data:",
    "DATA:IMAGE/PNG",
    "data:image/svg+xml;charset=utf-8",
    "data:application/octet-stream",
    "data:binary/octet-stream",
    "data:image",
    "data:png",
    "data: image/png ",
    "data:image/*",
]


def written(data: bytes, url_safe: bool, padded: bool, width: int, blank: str) -> str:
    """Base64 of bytes in one of its variants."""
    text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(data).decode()
    text = text if padded else text.rstrip("=")
    return blank.join(textwrap.wrap(text, width)) if width else text


VARIANT = st.builds(
    dict,
    url_safe=st.booleans(),
    padded=st.booleans(),
    width=st.sampled_from([0, 4, 76]),
    blank=st.sampled_from(["\n", "\r\n", " ", "\t"]),
)


@given(
    st.binary(max_size=200),
    VARIANT,
    st.sampled_from(HEADS),
    st.sampled_from([";base64,", ";BASE64,", "; Base64 ,", ";name=a.png;base64,"]),
    st.sampled_from(AROUND),
)
def test_every_variant_of_a_data_uri_gives_the_bytes(
    data: bytes, variant: dict[str, Any], head: str, tail: str, around: str
) -> None:
    uri = around + head + tail + written(data, **variant) + around
    assert is_data_uri(uri) and data_uri_bytes(uri) == data
    assert not data or ImageRef.of(uri).data == data
    assert base64_bytes(written(data, **variant)) == data


@given(st.binary(max_size=50))
def test_content_without_base64_is_percent_encoded(data: bytes) -> None:
    assert data_uri_bytes("data:image/png," + "".join(f"%{byte:02x}" for byte in data)) == data
    assert data_uri_bytes("data:image/png;base64," + base64.b64encode(data).decode().replace("=", "%3D")) == data


@given(st.text(max_size=40))
def test_text_is_a_data_uri_only_with_a_type_a_parameter_or_a_comma_after_the_scheme(text: str) -> None:
    assert (
        not is_data_uri(f"a {text}") and not is_data_uri(f"data: {text}") and not is_data_uri(f"my data:image {text}")
    )


@pytest.mark.parametrize("text", ["data: three apples, one pear", "Data-driven", "data", "database;base64,", "data:x"])
def test_ordinary_text_is_embedded_as_text(client: TestClient, embedder: Embedder, text: str) -> None:
    made = np.array(post(client, input=text).json()["data"][0]["embedding"])
    assert made @ embedder.encode([text])[0] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("form", ["url({})", "url('{}')", "<{}>", '"{}"', "({})"])
def test_a_data_uri_of_another_file_keeps_its_bytes(form: str) -> None:
    uri = form.format("data:image/png;base64,aGVsbG8=")
    assert is_data_uri(uri) and data_uri_bytes(uri) == b"hello"


BROKEN = [
    "data:image/png;base64,???",
    "data:image/png;base64",
    "data:;base64,aGVsbG8=",
    "data:image/png,hello",
    "data:,hello",
    " DATA:text/plain;base64,aGVsbG8=",
    "data:image/png;base64,aGVsbG8",
    "data:binary/octet-stream;base64,aGVsbG8=",
]


@pytest.mark.parametrize("uri", BROKEN)
@pytest.mark.parametrize("shape", ["string", "list", "text", "query", "cohere"])
def test_a_string_that_begins_like_a_data_uri_is_an_image_or_a_400(client: TestClient, uri: str, shape: str) -> None:
    answer = {
        "string": lambda: post(client, input=uri),
        "list": lambda: post(client, input=[uri]),
        "text": lambda: post(client, input=[{"text": uri}]),
        "query": lambda: post(client, "/v1/rerank", query=uri, documents=["a"]),
        "cohere": lambda: post(client, "/v2/embed", texts=[uri]),
    }[shape]()
    assert answer.status_code == 400 and answer.json()["error"]["code"] in ("bad_image", "bad_data_uri", "bad_text")


def test_each_variant_gives_the_vector_of_the_image(client: TestClient, embedder: Embedder, png: bytes) -> None:
    plain, lines = base64.b64encode(png).decode(), base64.encodebytes(png).decode()
    bare = [
        data_uri(png),
        f"data:;base64,{plain}",
        f"data:application/octet-stream;base64,{plain}",
        f"\n{data_uri(png)}",
    ]
    inside = [
        f"data:image/png;base64,{lines}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(png).decode()}",
        data_uri(png).rstrip("="),
        f"data:image/png;BASE64,{plain}",
        lines,
        plain.rstrip("="),
    ]
    answer = post(client, input=[*bare, *({"image": text} for text in inside)])
    assert answer.status_code == 200, answer.text
    made = np.array([item["embedding"] for item in answer.json()["data"]])
    assert (made @ embedder.encode([{"image": png}])[0]).min() == pytest.approx(1.0, abs=1e-4)
