"""Assigns the roles query, target and negatives to the columns of a table, by name or as given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm2vec.errors import UserError, did_you_mean, shown
from vlm2vec.media.data_uris import is_data_uri
from vlm2vec.media.images import IMAGE_ENDINGS

NUM_LOOKED_AT = 20  # number of values inspected to decide whether a column contains image paths

ALIASES = {
    **dict.fromkeys(("img", "image_path", "img_path", "image_file", "file_name", "filename", "picture"), "image"),
    **dict.fromkeys(("pos", "positives"), "positive"),
    **dict.fromkeys(("captions", "description"), "caption"),
    **dict.fromkeys(("sentence_1", "text1", "text_1"), "sentence1"),
    **dict.fromkeys(("sentence_2", "text2", "text_2"), "sentence2"),
    **{"image_1": "image1", "image_2": "image2", "class": "label"},
}
LAYOUTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("query_text", "query_image"), ("target_text", "target_image")),
    (("qry", "qry_image_path"), ("pos_text", "pos_image_path")),  # MMEB
    (("anchor",), ("positive",)),  # sentence-transformers
    (("query",), ("positive",)),
    (("query",), ("target",)),
    (("question", "image"), ("answer",)),
    (("query", "image"), ("answer",)),
    (("query",), ("document",)),
    (("query",), ("passage",)),
    (("query",), ("image",)),
    (("sentence1",), ("sentence2",)),
    (("image1",), ("image2",)),
    (("source",), ("target",)),
    (("caption",), ("image",)),
    (("text",), ("image",)),
    (("prompt",), ("image",)),
    (("title",), ("image",)),
    (("image",), ("label",)),
)
"""Columns of query and target, the most specific layout first. If a side lists two columns, one is sufficient."""
NEGATIVES = ("negative", "negatives", "neg", "neg_text", "neg_image_path", "negative_text", "negative_image")


@dataclass(frozen=True)
class PairColumns:
    """The roles of a table's columns.

    Attributes:
        query: The column with the text or image, or two columns with both.
        target: The same for the target.
        negatives: Columns that each contain a negative or a list of negatives.
        unused: All remaining columns.
    """

    query: tuple[str, ...]
    target: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def find_columns(
    where: str,
    names: Sequence[str],
    query: Sequence[str] = (),
    target: Sequence[str] = (),
    negatives: Sequence[str] = (),
) -> PairColumns:
    """Determines the roles of a table's columns.

    Raises:
        UserError: for an unknown column, a column that is both query and target, or names that match no layout.
    """
    for name in (*query, *target, *negatives):
        if name not in names:
            near = did_you_mean(name, names) or "."
            raise UserError(f"{where}: no column {shown(name)}{near} Columns: {', '.join(names)}")
    if both := sorted(set(query) & set(target)):
        raise UserError(f"{where}: column {', '.join(both)} is both query and target; give each its own column")
    known = {ALIASES.get(name.lower(), name.lower()): name for name in reversed(names)}
    for asked, wanted in LAYOUTS:
        of_query = tuple(query) or tuple(known[n] for n in asked if n in known and known[n] not in target)
        of_target = tuple(target) or tuple(known[n] for n in wanted if n in known and known[n] not in query)
        if of_query and of_target and not set(of_query) & set(of_target):
            found = tuple(negatives) or tuple(name for name in names if _is_negative(name))
            used = {*of_query, *of_target, *found}
            return PairColumns(of_query, of_target, found, tuple(name for name in names if name not in used))
    raise UserError(
        f"{where}: cannot tell query and target from the columns {', '.join(map(str, names))}; give them with "
        "--query COLUMN --target COLUMN, or rename them, such as to text and image, or anchor and positive"
    )


def _is_negative(name: str) -> bool:
    head, _, number = name.lower().rpartition("_")
    return name.lower() in NEGATIVES or (head == "negative" and number.isdigit())


def names_images(name: str, values: Sequence[Any]) -> bool:
    """Returns whether a column contains image paths, judged by the endings of its first values or by its name."""
    texts = [value for value in values if isinstance(value, str) and value][:NUM_LOOKED_AT]
    if texts and all(text.lower().endswith(IMAGE_ENDINGS) or is_data_uri(text) for text in texts):
        return True
    lower = name.lower()
    return ALIASES.get(lower, lower) in ("image", "image1", "image2") or lower.endswith(("_image", "_image_path"))
