"""Uses of undocumented transformers API: a failing test names what a new release has changed."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest
import transformers
from transformers.utils.hub import cached_files

import vlm2vec.models
from vlm2vec import UserError
from vlm2vec.models import transformers_internals
from vlm2vec.models.transformers_internals import DOORS, door

MODELS = Path(vlm2vec.models.__file__).parent
DOCUMENTED = {"transformers", "transformers.modeling_outputs", "transformers.image_utils", "transformers.video_utils"}


@pytest.mark.parametrize("name", DOORS)
def test_the_installed_transformers_has(name: str) -> None:
    assert door(name) is not None


def test_a_name_that_is_gone_is_an_error_that_says_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(import_module("transformers.conversion_mapping"), "get_model_conversion_mapping")
    with pytest.raises(UserError, match=r"has no transformers\.conversion_mapping\.get_model") as error:
        transformers_internals.weight_renamings(None)
    assert "adapters made with older classes" in str(error.value) and "constraints.txt" in str(error.value)
    monkeypatch.setitem(DOORS, "transformers.moved_away.thing", "a test")
    with pytest.raises(UserError, match=r"has no transformers\.moved_away\.thing, which vlm2vec needs for a test"):
        door("transformers.moved_away.thing")


def test_hub_files_can_be_looked_for_without_exceptions() -> None:
    asked = {f"_raise_exceptions_for_{what}" for what in ("gated_repo", "missing_entries", "connection_errors")}
    assert asked <= set(inspect.signature(cached_files).parameters)


def test_configurations_have_an_attention_implementation_that_can_be_shared() -> None:
    eager, other = (transformers.CLIPVisionConfig(attn_implementation=name) for name in ("eager", "sdpa"))
    transformers_internals.share_attention(eager, other)
    assert other._attn_implementation == "eager"
    assert hasattr(transformers.PreTrainedModel, "_keys_to_ignore_on_load_unexpected")  # Phi3V sets it


def test_no_other_module_imports_what_is_not_documented() -> None:
    found = []
    for path in MODELS.rglob("*.py"):
        if path.name == "transformers_internals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path.name}: {name}" for name in names if name.split(".")[0] == "transformers"]
    undocumented = [place for place in found if place.split(": ")[1] not in {*DOCUMENTED, "transformers.utils"}]
    assert undocumented == [] and found
