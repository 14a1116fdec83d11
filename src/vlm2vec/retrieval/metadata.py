"""Metadata of a vector store's rows: names of fields, values that every database can hold, fields in filters.

Fields of this package begin with `PREFIX`, so they never collide with a user's columns. A user's column keeps its name
where every database accepts that name; any other name is replaced by one that depends on the original name alone, so it
is the same in each row, part and run.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

from vlm2vec.errors import UserError, shown
from vlm2vec.media.text import printable

PREFIX = "v2v_"
THUMBNAIL = f"{PREFIX}thumbnail"
"""The only field that holds bytes: a small JPEG of the row's image."""
RESERVED = ("key", "vector")
"""Columns of every store that are not metadata."""
MAX_WHOLE = 1 << 53
"""Larger whole numbers are kept as text: a float64 cannot hold each of them exactly."""
PLAIN_WORD = re.compile(r"[^\W\d]\w*")
PLAIN_NAME = re.compile(r"[^\W\d_]\w*")
TOKENS = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\d[\w.]*|[^\W\d]\w*|.", re.DOTALL)
KEYWORDS = frozenset(
    [
        "AND",
        "OR",
        "NOT",
        "IN",
        "IS",
        "NULL",
        "LIKE",
        "ILIKE",
        "ESCAPE",
        "BETWEEN",
        "TRUE",
        "FALSE",
        "CASE",
        "WHEN",
        "THEN",
        "ELSE",
        "END",
        "CAST",
        "AS",
        "SIMILAR",
        "TO",
    ]
)
"""Words of a condition that never name a field unless they are quoted."""


def own(**fields: Any) -> dict[str, Any]:
    """Fields of this package under their full names: `own(path="a.png")` is `{"v2v_path": "a.png"}`."""
    return {PREFIX + name: value for name, value in fields.items()}


def is_own(name: str) -> bool:
    """Whether a field belongs to this package."""
    return name.startswith(PREFIX)


@lru_cache(4096)
def column_name(name: str) -> str:
    """Name under which a user's column is kept.

    The same name if it is a letter followed by letters, digits and underscores, is not reserved (`key`, `vector`) and
    does not begin with `PREFIX`. Otherwise the name's letters and digits followed by a hash of the original: databases
    give a meaning to names such as `_rowid` or `a.b`, and `a.b` and `a b` must stay two columns.
    """
    taken = name in RESERVED or name.lower().startswith(PREFIX)
    if PLAIN_NAME.fullmatch(name) and not taken:
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:6]
    stem = re.sub(r"[\W_]+", "_", name).strip("_")
    if not stem or stem[0].isdigit() or stem.lower().startswith(PREFIX):
        stem = f"column_{stem}".rstrip("_")
    return f"{stem}_{digest}"


def renamed_columns(names: Mapping[str, Any]) -> dict[str, str]:
    """The names that `column_name` changes, with the new name of each."""
    return {name: column_name(name) for name in names if column_name(name) != name}


def clean_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata in the form that every database can hold.

    Names as `column_name` makes them; values are text, numbers or booleans, anything else is JSON text. Only the field
    `THUMBNAIL` holds bytes.
    """
    return {name: values[0] for name, values in clean_columns([metadata]).items()}


def clean_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The metadata of rows by field, as `clean_metadata` makes it; a field that a row lacks is None."""
    columns = {}
    for name in dict.fromkeys(chain.from_iterable(rows)):
        values = [row.get(name) for row in rows]
        kept = name if is_own(name) else column_name(name)
        if name != THUMBNAIL:
            values = [x if type(x) is str and x.isascii() else plain_value(x) for x in values]  # most values are text
        columns[kept] = values
    return columns


def plain_value(value: Any) -> Any:
    """A value as text, number, boolean or None; NaN and Inf are None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):  # a bool is an int
        return value if abs(value) <= MAX_WHOLE else str(value)
    if value is None:
        return None
    if isinstance(value, Decimal):
        return float(value) if value.is_finite() and Decimal(float(value)) == value else str(value)
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if not isinstance(value, Mapping | list | tuple):  # a duration, a UUID
        return printable(str(value))
    return printable(json.dumps(value, sort_keys=True, default=str, ensure_ascii=False))


def as_text(value: bool | float | str) -> str:
    """The text of a value in a column of text.

    The form in which DataFusion casts a number (Rust's ryu, without the `.0` of a whole number): a column that becomes
    text later then holds what it would hold if it had been text from the first row.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, float):
        return str(value)
    text = repr(value).removesuffix(".0")
    mantissa, separator, exponent = text.partition("e")
    if not separator:
        return text
    return f"{Decimal(text):f}" if int(exponent) == -5 else f"{mantissa}e{int(exponent)}"


def resolve_fields(where: str, has_field: Callable[[str], bool], quote: str) -> str:
    """A SQL condition with each field's name as the store has it, quoted.

    A name in the condition is a user's column, by its original name or the one that is kept (in backticks or double
    quotes where it is not one word); else a field of this package, whose `PREFIX` may be left out, such as `width`.
    Other words stay.

    Args:
        where: The condition.
        has_field: Whether the store has a field of this name.
        quote: The database's quotation mark for names.

    Raises:
        UserError: for a semicolon outside of quotes: LanceDB would ignore what follows it.
    """
    tokens = TOKENS.findall(where)
    if ";" in tokens:
        raise UserError(
            f"filter {shown(where)}: expected one condition without a semicolon; join conditions by AND or OR"
        )
    for place, token in enumerate(tokens):
        quoted = token[0] in '`"' and len(token) > 1
        word = token[1:-1].replace('""', '"') if quoted else token
        called = tokens[place + 1 : place + 2] in (["("], ["."]) or tokens[place - 1 : place] == ["."]
        if not (quoted or (PLAIN_WORD.fullmatch(token) and token.upper() not in KEYWORDS and not called)):
            continue
        ours = PREFIX + word if PLAIN_WORD.fullmatch(word) else None
        for name in (word if is_own(word) else column_name(word), ours):
            if name and has_field(name):
                tokens[place] = f"{quote}{name}{quote}"
                break
    return "".join(tokens)
