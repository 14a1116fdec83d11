"""Collects all uses of undocumented API of transformers outside of training.

Each name is a row of `DOORS`. If a release of transformers removes a name, its use fails with an error that gives the
name, and so does tests/models/test_transformers_internals.py.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import transformers

from vlm2vec.errors import UserError

DOORS: dict[str, str] = {
    "transformers.PROCESSOR_MAPPING": "the processor of a family whose folder names none",
    "transformers.ProcessorMixin.get_processor_dict": "the settings of a folder's processor",
    "transformers.ProcessorMixin.get_attributes": "processors without their video part",
    "transformers.ProcessorMixin.from_args_and_dict": "processors without their video part",
    "transformers.BaseImageProcessor.get_image_processor_dict": "image settings of Phi-3 vision models",
    "transformers.BaseImageProcessor.valid_kwargs": "checking settings of image processors",
    "transformers.models.auto.tokenization_auto.get_tokenizer_config": "tokenizers of Phi-3 vision models",
    "transformers.utils.chat_template_utils.render_jinja_template": "prompts by a chat template",
    "transformers.utils.chat_template_utils._get_template_variables": "checking settings of chat templates",
    "transformers.conversion_mapping.get_model_conversion_mapping": "adapters made with older classes",
    "transformers.core_model_loading.WeightRenaming": "adapters made with older classes",
    "transformers.core_model_loading.WeightRenaming.rename_source_key": "adapters made with older classes",
    "transformers.vision_utils.get_vision_cu_seqlens": "sizes of images in Qwen's vision encoders",
    "transformers.vision_utils.get_vision_position_ids": "sizes of images in Qwen's vision encoders",
    "transformers.masking_utils._ignore_causal_mask_sdpa": "causal attention without a mask over padding on the right",
    "transformers.cache_utils.DynamicLayer": "sharing the first part of prompts in reranking",
    "transformers.utils.cached_file": "adapters on the hub",
    "transformers.PreTrainedConfig.get_config_dict": "the model type of a hub id",
}
"""Undocumented names and their purpose."""


def door(name: str) -> Any:
    """The function, class or attribute of a row of `DOORS`.

    Raises:
        UserError: if the installed transformers does not have it.
    """
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        try:
            return attrgetter(".".join(parts[split:]))(module)
        except AttributeError:
            break
    raise UserError(
        f"transformers {transformers.__version__} has no {name}, which vlm2vec needs for {DOORS[name]}; "
        "install the version in constraints.txt"
    )


def processor_parts(source: str, common: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The processor class of a folder or hub id, and the settings that its folder has for it.

    Args:
        source: A folder or hub id.
        common: Revision and trust.
    """
    saved = processor_settings(source, common["revision"])
    config = transformers.AutoConfig.from_pretrained(source, **common)
    named = getattr(transformers, saved.get("processor_class", ""), None)
    return named or door("transformers.PROCESSOR_MAPPING")[type(config)], saved


def processor_settings(source: str, revision: str | None) -> dict[str, Any]:
    """The settings of a folder's or hub id's processor, all files that have some together."""
    saved: dict[str, Any] = door("transformers.ProcessorMixin.get_processor_dict")(source, revision=revision)[0]
    return saved


class _WithoutParts(transformers.ProcessorMixin):  # type: ignore[misc]
    """Stands between a family's processor and its base class, which rejects the name of a part that is left out."""

    def __init__(self, *args: Any, **parts: Any) -> None:
        kept = {name: part for name, part in parts.items() if part is not None or name in self.get_attributes()}
        super().__init__(*args, **kept)


def build_processor(family: Any, parts: dict[str, Any], saved: dict[str, Any]) -> Any:
    """A processor of a family from some of its parts.

    Args:
        family: A subclass of `ProcessorMixin`. A subclass of it, of the same name, is made for this one processor.
        parts: By name, such as `tokenizer`.
        saved: Settings, see `processor_settings`.
    """
    names = family.get_attributes()  # its constructor takes every part by position; those left out are None
    kept = [name for name in names if name in parts]
    smaller: Any = type(family.__name__, (family, _WithoutParts), {"get_attributes": classmethod(lambda _: kept)})
    return smaller.from_args_and_dict([parts.get(name) for name in names], saved)


def image_setting_names(image_processor: Any) -> set[str]:
    """Names of the settings that an image processor accepts."""
    door("transformers.BaseImageProcessor.valid_kwargs")
    return set(image_processor.valid_kwargs.__annotations__)


def image_processor_settings(source: str, revision: str | None) -> dict[str, Any]:
    """Content of a folder's or hub id's `preprocessor_config.json`."""
    read = door("transformers.BaseImageProcessor.get_image_processor_dict")
    saved: dict[str, Any] = read(source, revision=revision)[0]
    return saved


def tokenizer_config(source: str, revision: str | None) -> dict[str, Any]:
    """Content of a folder's or hub id's `tokenizer_config.json`."""
    read = door("transformers.models.auto.tokenization_auto.get_tokenizer_config")
    config: dict[str, Any] = read(source, revision=revision)
    return config


def model_type(source: str, revision: str | None) -> str:
    """`model_type` in a hub id's `config.json`. The file is read as it is; no class or code of the hub is needed.

    Raises:
        OSError, ValueError: if the hub does not have it.
    """
    read = door("transformers.PreTrainedConfig.get_config_dict")
    return str(read(source, revision=revision)[0].get("model_type", ""))


def render_chat(messages: Sequence[dict[str, Any]], template: str, variables: dict[str, Any]) -> str:
    """The prompt that a Jinja chat template writes of one conversation.

    Raises:
        jinja2.exceptions.TemplateError: if the template is invalid, or rejects the conversation.
    """
    render = door("transformers.utils.chat_template_utils.render_jinja_template")
    rendered, _ = render([list(messages)], chat_template=template, **variables)
    prompt: str = rendered[0]
    return prompt


def template_variables(template: str) -> set[str]:
    """Names of the variables that a Jinja chat template reads.

    Raises:
        jinja2.TemplateSyntaxError: if the template is invalid.
    """
    names: set[str] = set(door("transformers.utils.chat_template_utils._get_template_variables")(template))
    return names


def weight_renamings(model: Any) -> list[Callable[[str], str]]:
    """The renamings of weights that transformers applies when it loads older files into this model, in order."""
    renaming = door("transformers.core_model_loading.WeightRenaming")
    door("transformers.core_model_loading.WeightRenaming.rename_source_key")
    changes = door("transformers.conversion_mapping.get_model_conversion_mapping")(model)
    return [partial(_rename, change) for change in changes if isinstance(change, renaming)]


def _rename(renaming: Any, name: str) -> str:
    renamed: str = renaming.rename_source_key(name)[0]
    return renamed


def hub_file(source: str, name: str, revision: str | None) -> Path | None:
    """A file of a hub repository in the local cache, downloaded if needed; None if the repository has none.

    Raises:
        OSError: if there is no such repository.
    """
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    path = door("transformers.utils.cached_file")(source, name, revision=revision, **quiet)
    return Path(path) if path else None


def vision_sequences(sizes: Any, merge: int) -> tuple[Any, Any]:
    """Where each image's patches end [N + 1], and the positions of all patches [P, 2], as Qwen's vision encoders do.

    Args:
        sizes: Frames, height and width of each image in patches, [N, 3].
        merge: Patches on a side that become one token.
    """
    ends, positions = (door(f"transformers.vision_utils.get_vision_{name}") for name in ("cu_seqlens", "position_ids"))
    return ends(sizes), positions(sizes, merge)


_PADDING = threading.local()


@contextmanager
def causal_without_mask(is_exact: bool) -> Iterator[None]:
    """Causal layers of this thread build no attention mask for padding, in every model that takes `sdpa`.

    A causal token never attends to padding on its right, so the mask changes no state except those of padding. Without
    it, the host does not wait for the device to learn whether there is padding, no [B, 1, L, L] mask is stored, and
    torch may choose its fastest kernel.

    Args:
        is_exact: Whether all padding is on the right and the pooling ignores its states; if not, nothing changes.
    """
    _patch_causal_masks()
    before = getattr(_PADDING, "is_ignored", False)
    _PADDING.is_ignored = is_exact
    try:
        yield
    finally:
        _PADDING.is_ignored = before


@cache
def _patch_causal_masks() -> None:
    from transformers import masking_utils

    without_padding = door("transformers.masking_utils._ignore_causal_mask_sdpa")

    def needs_no_mask(padding_mask: Any, *args: Any, **named: Any) -> bool:
        is_ignored = getattr(_PADDING, "is_ignored", False) and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        skipped: bool = without_padding(None if is_ignored else padding_mask, *args, **named)
        return skipped

    masking_utils._ignore_causal_mask_sdpa = needs_no_mask


def share_attention(source: Any, target: Any) -> None:
    """Gives one configuration the attention implementation of another."""
    target._attn_implementation = source._attn_implementation


@contextmanager
def only_errors() -> Iterator[None]:
    """Suppresses what transformers says below an error, such as its report on weights left out on purpose."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Suppresses the progress bars of transformers, and what it says below an error."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with only_errors():
            yield
    finally:
        logging.enable_progress_bar()
