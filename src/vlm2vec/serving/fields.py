"""Fields of a store as people and agents see them: the short names that filters accept, without internal fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm2vec.jobs.state import STATE
from vlm2vec.retrieval.metadata import PREFIX, THUMBNAIL
from vlm2vec.retrieval.vector_store import VectorStore

HIDDEN = (*STATE, THUMBNAIL)


def filter_fields(store: VectorStore) -> dict[str, str]:
    """Names and types of the fields that a filter may use."""
    return visible(store.fields())


def visible(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields or metadata without the internal ones; `PREFIX` is left out unless a user's column has the short name."""
    shown = {name: value for name, value in fields.items() if name not in HIDDEN}
    short = {name: name.removeprefix(PREFIX) for name in shown}
    return {name if short[name] in fields else short[name]: value for name, value in shown.items()}
