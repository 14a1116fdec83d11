"""Unusual inputs and requests of the soak test, by kind of fault.

Each kind is one that users of embedding servers reported: images in odd pixel modes or with odd metadata, data URIs in
every variant, texts beyond the model's limit, missing values, broken files, places that the server must not read. A
valid input must give the library's vector. An invalid input must be refused without affecting the rest of its request.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

JSON = "application/json"


@dataclass(frozen=True)
class Unusual:
    """An input of the soak test.

    Attributes:
        kind: Kind of fault, for the counts.
        value: The input as it is sent.
        expected: The same input for the library; None: the server must refuse the input.
    """

    kind: str
    value: Any
    expected: Any = None


@dataclass(frozen=True)
class BadRequest:
    """A request that the server must refuse as a whole, with a status between 400 and 499."""

    kind: str
    body: bytes
    content_type: str = JSON


def unusual_inputs() -> list[Unusual]:
    """Inputs of every kind: valid ones with what the library gets, and invalid ones."""
    return [*_odd_images(), *_data_uris(), *_odd_texts(), *_refused_images(), *_refused_texts()]


def bad_requests() -> list[BadRequest]:
    """Requests of every kind that is refused as a whole."""
    wrong_types: list[Any] = [[], {}, None, 5, [1.5], ["a", None], [{"text": 5}], [{"image": ["a"]}], [[1, "a"]]]
    bodies = [("wrong type", json.dumps({"input": value}).encode()) for value in wrong_types]
    fields: list[dict[str, Any]] = [{"dimensions": "x"}, {"dimensions": 0}, {"encoding_format": "xml"}, {"model": "no"}]
    bodies += [("wrong field", json.dumps({"input": "a", **field}).encode()) for field in fields]
    bodies += [("broken JSON", body) for body in (b"", b"{", b'{"input": "\xff\xfe"}', b"\xef\xbb\xbf[")]
    long = base64.b64encode(bytes(1_000_000)).decode()
    bodies.append(("image bytes in a wrong field", json.dumps({"input": "a", "encoding_format": long}).encode()))
    return [
        *(BadRequest(kind, body) for kind, body in bodies),
        BadRequest("content type", b'{"input": "a"}', "application/x-www-form-urlencoded"),
    ]


def _scene(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((256, 192), Image.Resampling.BICUBIC)


def _file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def _uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _odd_images() -> list[Unusual]:
    """Valid images in every pixel mode, and with metadata that decoders trip over."""
    modes = [
        _file(_scene(seed).convert(mode)) for seed, mode in enumerate(("1", "L", "LA", "P", "RGBA", "I;16"), start=1)
    ]
    modes.append(_file(_scene(7).convert("CMYK"), "JPEG"))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    odd = [_file(_scene(8), "JPEG", exif=exif), _file(_scene(9), "JPEG", exif=b"Exif\0\0II*\0broken")]
    kinds = [*(("pixel mode", data) for data in modes), *(("odd EXIF", data) for data in odd)]
    return [Unusual(kind, {"image": _uri(data)}, {"image": data}) for kind, data in kinds]


def _data_uris() -> list[Unusual]:
    """One image in the variants that clients send."""
    data = _file(_scene(10))
    plain, lines = base64.b64encode(data).decode(), base64.encodebytes(data).decode()
    safe = base64.urlsafe_b64encode(data).decode()
    strings = [f"data:;base64,{plain}", f"data:application/octet-stream;base64,{plain}", f"\n{_uri(data)}"]
    strings.append(f"data:binary/octet-stream;base64,{plain}")
    inside = [f"data:image/png;base64,{lines}", f"data:image/png;base64,{safe}", f"data:image/png;BASE64,{plain}"]
    inside += [_uri(data).rstrip("="), lines, plain.rstrip("=")]
    values: list[Any] = [*strings, *({"image": text} for text in inside)]
    return [Unusual("data URI variant", value, {"image": data}) for value in values]


def _odd_texts() -> list[Unusual]:
    texts = ["\ufeffab", "data: ab", "Ünïcödé ab", "ab\0cd", "a" * 300]
    return [Unusual("odd text", text, text) for text in texts]


def _refused_images() -> list[Unusual]:
    whole = _file(Image.new("RGB", (64, 64), "red"))
    bomb = whole[:16] + (60_000).to_bytes(4, "big") * 2 + whole[24:]
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    broken = [_uri(data) for data in (whole[: len(whole) // 2], bomb, svg, bytes(1_000_000), b"")]
    places = ["file:///etc/passwd", "http://127.0.0.1/a.png", "../a.png", "a\0.png"]
    return [
        *(Unusual("broken image", {"image": text}) for text in broken),
        *(Unusual("forbidden place", {"image": text}) for text in places),
        *(Unusual("broken data URI", text) for text in ("data:image/png,not base64", "data:;base64,???")),
    ]


def _refused_texts() -> list[Unusual]:
    values: list[tuple[str, Any]] = [("too long", "x" * 1_000_000), ("too long", "x" * 90_000)]
    values += [("missing", {}), ("missing", ""), ("missing", {"text": None}), ("invalid Unicode", "\ud800")]
    return [Unusual(kind, value) for kind, value in values]
