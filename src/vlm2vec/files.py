"""Reads JSON files strictly, and writes files and folders whole or not at all.

A target is written to a temporary name beside it, then renamed:

    with replacing(path) as beside:
        save_file(tensors, beside)

A reader never sees half a file, and a process that is killed leaves the previous version in place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm2vec.errors import UserError, shown
from vlm2vec.media.text import parse_json, read_text

TEMPORARY = ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the target's folder and renames it to `path` when the block ends.

    Whatever was at `path` is replaced: a file, or a folder. Parent folders are created. If the block raises, the
    temporary file or folder is removed and `path` keeps its previous content. An error of the operating system
    that names no file (as from most libraries if the disk is full) gets the name of `path`.

    Args:
        path: The target.

    Yields:
        A path that does not exist yet, with the target's suffix (some writers choose the format by it). The block must
        create a file or a folder there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{TEMPORARY}{path.suffix}")
    try:
        with named_errors(path):
            yield beside
        if path.is_dir() and beside.is_dir():
            shutil.rmtree(path)
        beside.replace(path)
    finally:
        _remove(beside)


@contextmanager
def named_errors(path: Path | str) -> Iterator[None]:
    """Adds a path to errors of the operating system that name none, such as those of pyarrow and safetensors.

    Libraries in Rust raise exceptions of their own; the system's error number is at the end of their text.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _number_in(str(error))
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _number_in(text: str) -> int | None:
    """The error number of `… (os error 28)`."""
    found = re.search(r"\(os error (\d+)\)", text)
    return int(found.group(1)) if found else None


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON with a final line break, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Reads a JSON file; returns None if it does not exist.

    Raises:
        UserError: if it is not valid JSON.
    """
    if not path.is_file():
        return None
    return parse_json(read_text(path), str(path))


def read_yaml(path: Path) -> Any:
    """Reads a YAML file strictly: a key that a mapping has twice is an error, since one of its values would be lost.

    Raises:
        UserError: if it is not readable, not valid in UTF-8, or not valid YAML.
    """
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"key {shown(twice)} appears twice")
            return super().construct_mapping(node, deep)

    text = read_text(path)
    try:
        return yaml.load(text, UniqueKeys)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())[:200]})") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty if there is no such file.

    Raises:
        UserError: if it is not valid JSON, or any other value.
    """
    content = read_json(path)
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {shown(content)}")
    return content or {}
