"""Errors of request validation in the words of the wire format: the field, and what was expected there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vlm2vec.serving.refusals import Refusal

INPUT = "a string, a list of token ids, or an object with text, image or both"
EXPECTED = {
    "input": f"{INPUT}; or a list of these",
    "query": INPUT,
    "queries": f"a list; each entry is {INPUT}",
    "targets": f"a list; each entry is {INPUT}",
    "documents": f"a list; each entry is {INPUT}",
    "messages": "a list of messages with role and content",
    "content": "a string, or a list of parts with type text, image_url or image",
    "image": "a string, or an object with url",
    "image_url": "a string, or an object with url",
    "images": "a list; each entry is a string, or an object with url",
}
EMPTY = "the list is empty; expected at least one entry"
WORDS = {
    "missing": "required field is missing",
    "extra_forbidden": "unknown field",
    "string_type": "expected a string",
    "int_type": "expected an integer",
    "bool_type": "expected true or false",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "literal_error": "expected {expected}",
    "greater_than_equal": "expected {ge} or more",
    "greater_than": "expected more than {gt}",
    "less_than_equal": "expected {le} or less",
    "less_than": "expected less than {lt}",
    "too_short": EMPTY,
    "too_long": "expected at most {max_length} entries",
    "json_invalid": "the body is not valid JSON ({error})",
    "value_error": "{error}",
    "union_tag_not_found": "expected a part with type text, image_url or image",
    "union_tag_invalid": "expected a part with type text, image_url or image",
}
OBJECTS = ("model_attributes_type", "model_type", "dict_type")
JSON_TYPES = ("application/json", "+json")


def invalid_request(errors: Sequence[Mapping[str, Any]], body: Any, content_type: str) -> Refusal:
    """The refusal of a request that does not fit its schema. It repeats no value of the request.

    Args:
        errors: As pydantic reports them; a union reports one error per alternative.
        body: The request, to tell fields from the names of alternatives in the places of errors.
        content_type: Header of the request.
    """
    if not content_type.partition(";")[0].strip().lower().endswith(JSON_TYPES):
        return Refusal(415, "unsupported_media_type", "Content-Type: expected application/json", param="Content-Type")
    places = [_place(error, body) for error in errors]
    # The alternative that fits best fails at the deepest place; most of its alternatives fail there, too.
    counts = Counter(places)
    place = max(counts, key=lambda one: (len(one), counts[one]))
    here = [error for error, at in zip(errors, places, strict=True) if at == place]
    name = _written(place)
    reason = _reason(here, place)
    return Refusal(400, "invalid_request", f"{name}: {reason}" if name else reason, param=name or None)


def _place(error: Mapping[str, Any], body: Any) -> tuple[str | int, ...]:
    """The keys and positions on the way to an error, without the names of alternatives."""
    found: list[str | int] = []
    parts, value = list(error["loc"])[1:], body
    if error["type"] == "json_invalid":
        return ()
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if isinstance(value, dict) and (part in value or (last and error["type"] == "missing")):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        found.append(part)
    return tuple(found)


def _written(place: Sequence[str | int]) -> str:
    """As in `messages[0].content`. Keys that a client made up are cut to a readable length."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part[:60]}" for part in place).lstrip(".")


def _reason(errors: Sequence[Mapping[str, Any]], place: Sequence[str | int]) -> str:
    field = next((part for part in reversed(place) if isinstance(part, str)), "")
    kinds = {error["type"] for error in errors}
    if "too_short" in kinds:
        return EMPTY
    own = [error for error in errors if error["type"] == "value_error"]  # of this package: it says what is wrong
    if len(errors) > 1 and field in EXPECTED and not own:
        # An entry of a list of inputs is described like a single input.
        return f"expected {INPUT if place and isinstance(place[-1], int) else EXPECTED[field]}"
    if kinds & set(OBJECTS) or (not place and "missing" in kinds):
        return "expected a JSON object"
    first = (own or errors)[0]
    context = {key: str(value) for key, value in first.get("ctx", {}).items()}
    return WORDS.get(first["type"], "invalid value").format_map(context)
