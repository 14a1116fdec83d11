"""A bad input fails alone, an unusual one gets the vector of the library, and health checks are accurate."""

from __future__ import annotations

import base64
import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from starlette.testclient import TestClient
from tiny.models import draw_image
from wire import data_uri, encoded, post

from vlm2vec import Embedder


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_that_claims(side: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def png_with_text_of(size: int, png: bytes) -> bytes:
    """A small image with a compressed comment that decompresses to `size` bytes."""
    return png[:33] + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(size), 9)) + png[33:]


LUCK = RuntimeError("out of luck")
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
BAD: dict[str, Callable[[bytes], Any]] = {
    "truncated": lambda png: {"image": data_uri(png[: len(png) // 2])},
    "a decompression bomb": lambda png: {"image": data_uri(png_that_claims(60_000))},
    "a bomb in a comment": lambda png: {"image": data_uri(png_with_text_of(50_000_000, png))},
    "100 megapixels": lambda png: {"image": data_uri(encoded(Image.new("1", (10_000, 10_000))))},
    "svg": lambda png: {"image": data_uri(SVG, "image/svg+xml")},
    "svg that says it is png": lambda png: {"image": data_uri(SVG)},
    "a page that says it is png": lambda png: {"image": data_uri(b"<!doctype html><p>not an image</p>")},
    "a page in a data URI": lambda png: {"image": "data:text/html,<p>not an image</p>"},
    "a NUL byte in a name": lambda png: {"image": "a\0.png"},
    "a lone surrogate": lambda png: "\ud800",
    "a lone surrogate in a name": lambda png: {"image": "\ud800.png"},
    "a million characters": lambda png: "x" * 1_000_000,
    "empty": lambda png: {},
    "no base64": lambda png: {"image": "data:image/png;base64,???"},
}


def vectors_of(answer: Any) -> np.ndarray:
    return np.array([item["embedding"] for item in answer.json()["data"]])


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_fails_alone(client: TestClient, embedder: Embedder, png: bytes, name: str) -> None:
    inputs = ["fine", BAD[name](png), {"image": data_uri(png)}]
    answer = post(client, input=inputs, partial=True)
    assert answer.status_code == 200, answer.text
    assert [item["index"] for item in answer.json()["data"]] == [0, 2]
    assert [error["index"] for error in answer.json()["errors"]] == [1]
    assert (vectors_of(answer) * embedder.encode(["fine", {"image": png}])).sum(axis=1).min() >= 0.9999
    alone = post(client, input=inputs)
    assert 400 <= alone.status_code < 500 and alone.json()["error"]["param"] == "input[1]"
    assert client.get("/health/ready").status_code == 200


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(draw_image(40, 24, seed=2), "JPEG", exif=exif)


def moving() -> bytes:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


UNUSUAL: dict[str, Callable[[], bytes]] = {
    "one pixel": lambda: encoded(Image.new("RGB", (1, 1), "red")),
    "one pixel high": lambda: encoded(Image.new("RGB", (900, 1), "red")),
    "cmyk": lambda: encoded(draw_image(30, 20, seed=3).convert("CMYK"), "JPEG"),
    "16 bit": lambda: encoded(Image.fromarray(np.linspace(0, 65_535, 600, dtype=np.uint16).reshape(20, 30))),
    "turned by exif": turned,
    "animated": moving,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_image_gets_the_vector_of_the_library_and_affects_no_other(
    client: TestClient, embedder: Embedder, png: bytes, name: str
) -> None:
    data = UNUSUAL[name]()
    answer = post(client, input=["fine", {"image": data_uri(data)}, {"image": data_uri(png)}])
    assert answer.status_code == 200, answer.text
    want = embedder.encode(["fine", {"image": data}, {"image": png}])
    assert (vectors_of(answer) * want).sum(axis=1).min() >= 0.9999


def vector_of(client: TestClient, data: bytes, kind: str = "image/png") -> np.ndarray:
    return vectors_of(post(client, input=[{"image": data_uri(data, kind)}]))[0]


def test_an_animated_image_is_its_first_frame(client: TestClient) -> None:
    still = encoded(Image.new("RGB", (32, 32), "red"), "GIF")
    assert vector_of(client, moving(), "image/gif") @ vector_of(client, still) == pytest.approx(1.0, abs=1e-4)


def test_an_image_turned_by_exif_is_embedded_upright(client: TestClient) -> None:
    with Image.open(io.BytesIO(turned())) as stored:
        upright = encoded(ImageOps.exif_transpose(stored).convert("RGB"))
        lying = encoded(stored.convert("RGB"))
    made = vector_of(client, turned(), "image/jpeg")
    assert made @ vector_of(client, upright) == pytest.approx(1.0, abs=1e-4)
    assert made @ vector_of(client, lying) < 0.999


def test_an_image_is_what_its_bytes_are_whatever_its_label_says(client: TestClient, png: bytes) -> None:
    for kind in ("image/jpeg", "image/gif", "application/octet-stream"):
        assert vector_of(client, png, kind) @ vector_of(client, png) == pytest.approx(1.0, abs=1e-4)


def test_nul_bytes_in_a_text_are_text(client: TestClient, embedder: Embedder) -> None:
    texts = ["a\0b", "\0", "fine"]
    made = vectors_of(post(client, input=texts))
    assert (made * embedder.encode(texts)).sum(axis=1).min() >= 0.9999


def test_base64_that_is_no_image_fails_as_an_image(client: TestClient) -> None:
    answer = post(client, input=[{"image": base64.b64encode(bytes(90)).decode()}])
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "bad_image"


@pytest.fixture
def fails_on(embedder: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`fails_on(condition, error)`: forward passes raise the error for batches that meet the condition."""
    usual = embedder.backbone.forward

    def put(condition: Callable[[Any], bool], error: Exception = LUCK) -> None:
        def forward(batch: Any) -> Any:
            if condition(batch):
                raise error
            return usual(batch)

        monkeypatch.setattr(embedder.backbone, "forward", forward)

    return put


def test_a_failed_batch_is_retried_input_by_input(
    embedder: Any, serving: Callable[..., TestClient], fails_on: Callable[..., None]
) -> None:
    (culprit, *_) = embedder.backbone.tokenizer("poison", add_special_tokens=False)["input_ids"]
    fails_on(lambda batch: bool((batch["input_ids"] == culprit).any()))
    client = serving(result_cache_bytes=0)
    answer = post(client, input=["a", "poison", "b"], partial=True).json()
    assert [item["index"] for item in answer["data"]] == [0, 2]
    assert answer["errors"][0]["code"] == "model_failed" and "luck" not in str(answer)
    assert client.get("/health/ready").status_code == 200


@pytest.mark.parametrize(
    ("error", "is_input"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (ValueError("bad shape"), True),
        (IndexError("index 5 is out of range"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), True),  # the device still computes
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ..."), False),
    ],
)
def test_a_broken_device_is_never_a_bad_input(
    embedder: Any,
    serving: Callable[..., TestClient],
    fails_on: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    is_input: bool,
) -> None:
    (culprit, *_) = embedder.backbone.tokenizer("poison", add_special_tokens=False)["input_ids"]
    fails_on(lambda batch: bool((batch["input_ids"] == culprit).any()), error)
    reasons: list[str] = []
    monkeypatch.setattr("vlm2vec.serving.engine.ANSWER_SECONDS", 0.0)
    monkeypatch.setattr("vlm2vec.serving.engine.exit_now", reasons.append)
    client = serving(result_cache_bytes=0)
    answer = post(client, input=["a", "poison", "b"], partial=True).json()
    codes = {one["index"]: one["code"] for one in answer["errors"]}
    if is_input:
        assert codes == {1: "model_failed"} and not reasons
        assert client.get("/health/ready").status_code == 200
        return
    assert codes.get(1) == "model_unavailable" and "model_failed" not in codes.values()
    assert post(client, input="c").status_code == client.get("/health/ready").status_code == 503
    assert reasons == ["CUDA error: an illegal memory access was encountered"]  # once, in one line


def test_the_process_of_a_broken_device_ends_with_its_reason() -> None:
    script = "from vlm2vec.serving.engine import exit_now; exit_now('CUDA error: unspecified launch failure')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: the device failed (CUDA error: unspecified launch failure); start the server again\n"


def test_readiness_follows_whether_the_model_works(
    serving: Callable[..., TestClient], fails_on: Callable[..., None]
) -> None:
    broken = True
    fails_on(lambda batch: broken)
    client = serving(result_cache_bytes=0)
    answer = post(client, input="a")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_unavailable"
    assert client.get("/health/ready").status_code == client.get("/health").status_code == 503
    assert client.get("/health/live").status_code == 200
    broken = False
    assert client.get("/health/ready").status_code == 200
    assert post(client, input="a").status_code == 200
