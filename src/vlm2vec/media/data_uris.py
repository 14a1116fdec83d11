"""Images inside strings: data URIs and bare base64, in the variants that clients send.

Accepted beyond RFC 2397 and RFC 4648: line breaks and blanks, the URL-safe alphabet, missing padding, any case of
`data:` and `base64`, percent-encoded letters, and any media type (an image is identified by its bytes).
"""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

# `data:` followed by a known media type, any other type with a parameter, a parameter or a comma.
# "data: three apples, one pear" is ordinary text.
TYPES = "application|audio|chemical|example|font|image|message|model|multipart|text|video"
START = re.compile(rf"\s*data:(?:(?:{TYPES})/|[\w.+-]+/[\w.+-]+;|;|,|base64,)", re.IGNORECASE)
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
    head, comma, body = uri.strip().partition(",")
    if not comma or len(head) > HEAD_CHARS:
        return None
    words = [word.strip().lower() for word in head.partition(":")[2].split(";")]
    if "base64" not in words:
        try:
            return unquote_to_bytes(body)
        except UnicodeEncodeError:  # a lone surrogate
            return None
    return base64_bytes(unquote_to_bytes(body).decode("latin-1") if "%" in body else body)


def base64_bytes(text: str) -> bytes | None:
    """Decode base64 with line breaks, URL-safe letters or missing padding; None if it is not base64."""
    letters = "".join(text.split()).translate(URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
