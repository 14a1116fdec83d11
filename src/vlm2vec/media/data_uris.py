"""Images inside strings: data URIs and bare base64, in the variants that clients send.

Accepted beyond RFC 2397 and RFC 4648: line breaks and blanks, the URL-safe alphabet, missing padding, any case of
`data:` and `base64`, percent-encoded letters, any media type or none (an image is identified by its bytes), and what
surrounds a URI in other files: a byte order mark, quotation marks, `<>` and CSS's `url()`.
"""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

AROUND = " \t\r\n\f\v\xa0\ufeff\u200b\u2060\"'`<>()"
# `data:` followed by a known media type, any other type with a parameter, a parameter or a comma, or by anything that
# ends in `;base64,`. "data: three apples, one pear" is ordinary text.
TYPES = "application|audio|chemical|example|font|image|message|model|multipart|text|video"
BEFORE = rf"[\s{re.escape(AROUND)}]*(?:url\()?[\s\"']*"
START = re.compile(
    rf"{BEFORE}data:(?:(?:{TYPES})/|[\w.+-]+/[\w.+-]+;|;|,|base64,|[^,]{{0,200}};\s*base64\s*,)", re.IGNORECASE
)
HEAD_CHARS = 1000
URL_SAFE = str.maketrans("-_", "+/")


def is_data_uri(text: str) -> bool:
    """Whether a string begins like a data URI, valid or not."""
    return START.match(text) is not None


def data_uri_bytes(uri: str) -> bytes | None:
    """Decode a data URI; None if it is not valid.

    Args:
        uri: String for which `is_data_uri` holds. Without `;base64` the content is percent-encoded.
    """
    head, comma, body = uri.partition(",")
    if not comma or len(head) > HEAD_CHARS:
        return None
    words = [word.strip().lower() for word in head.partition(":")[2].split(";")]
    if not {"base64", "base64url"} & set(words):
        try:
            return unquote_to_bytes(body.rstrip())
        except UnicodeEncodeError:  # a lone surrogate
            return None
    body = body.rstrip(AROUND)
    return base64_bytes(unquote_to_bytes(body).decode("latin-1") if "%" in body else body)


def base64_bytes(text: str) -> bytes | None:
    """Decode base64 with line breaks, URL-safe letters or missing padding; None if it is not base64."""
    letters = "".join(text.split()).translate(URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
