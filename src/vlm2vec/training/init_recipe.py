"""Writes a recipe template with every key, its default and its description."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic.fields import FieldInfo

from vlm2vec.errors import UserError
from vlm2vec.files import write_text
from vlm2vec.training.config import Recipe
from vlm2vec.training.loss_settings import Section

WIDTH = 100
EXAMPLES = {"root": "data/train", "steps": 1000, "output": "runs/mine", "benchmark": "benchmark.yaml"}
"""Example values for keys without a default."""


def write_commented_recipe(path: Path) -> None:
    """Writes a recipe whose comments explain every key.

    Raises:
        UserError: if the file exists.
    """
    if path.exists():
        raise UserError(f"{path}: already exists; choose another name or delete it")
    head = f"# A training recipe. Keys that keep their default can be deleted. Run: vlm2vec train {path}\n"
    write_text(path, head + "\n".join(_lines(Recipe, "")) + "\n")


def _lines(section: type[Section], indent: str) -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        inner = _section_of(field)
        lines += ["", *_comment(inner.__doc__ or "", indent)] if inner else _comment(field.description or "", indent)
        if inner is None:
            lines.append(f"{indent}{name}: {_value(name, field)}")
        elif field.default is None:  # a section that is off
            lines += [f"{indent}# {line}".rstrip() for line in [f"{name}:", *_lines(inner, "  ")]]
        else:
            lines += [f"{indent}{name}:", *_lines(inner, indent + "  ")]
    return lines


def _section_of(field: FieldInfo) -> type[Section] | None:
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _comment(text: str, indent: str) -> list[str]:
    words = " ".join(text.split())
    return [f"{indent}# {line}" for line in textwrap.wrap(words, WIDTH - len(indent))]


def _value(name: str, field: FieldInfo) -> str:
    value: Any = EXAMPLES[name] if field.is_required() else field.get_default(call_default_factory=True)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("...").strip()
