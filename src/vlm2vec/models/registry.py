"""The class of each model family, by the `model_type` of its config or the name of a built-in model."""

from __future__ import annotations

import importlib
from pathlib import Path

from vlm2vec.errors import UserError, did_you_mean
from vlm2vec.files import read_object
from vlm2vec.models.backbones.base import Backbone, MediaTokens
from vlm2vec.models.checkpoints.replaced import refuse_replaced

BUILT_IN = {
    "compact": "vlm2vec.models.backbones.compact.model:Compact",
    "compact-dual": "vlm2vec.models.backbones.compact.dual:CompactDual",
}
KNOWN = sorted(BUILT_IN)
BACKBONES: dict[str, str] = {
    **dict.fromkeys(("clip", "metaclip_2", "siglip", "siglip2"), "vlm2vec.models.backbones.dual:DualEncoder"),
    "blip": "vlm2vec.models.backbones.blip:Blip",
    "blip-2": "vlm2vec.models.backbones.blip:Blip2",
    "mistral3": "vlm2vec.models.backbones.mistral3:Mistral3",
    "mllama": "vlm2vec.models.backbones.mllama:Mllama",
    "open_clip": "vlm2vec.models.backbones.open_clip:OpenClip",
    "paligemma": "vlm2vec.models.backbones.paligemma:PaliGemma",
    "phi3_v": "vlm2vec.models.backbones.phi3_v:Phi3Vision",
}
CONFIGS = ("config.json", "adapter_config.json", "embedder.json")
"""Files of which a checkpoint folder has one."""
GENERIC = "vlm2vec.models.backbones.generic:Generic"


def backbone_class(source: str, revision: str | None = None) -> type[Backbone]:
    """The class that loads `source`.

    Args:
        source: Name of a built-in, a folder, or a hub id.
        revision: Hub revision.

    Raises:
        UserError: if `source` is not a built-in, a folder with a config, or a hub id.
    """
    refuse_replaced(source)
    if source in BUILT_IN:
        return _import(BUILT_IN[source])
    return _import(BACKBONES.get(_model_type(source, revision), GENERIC))


def media_tokens(family: str) -> MediaTokens | None:
    """The tokens of a family's prompts that mark an image and a video, see `Backbone.media_tokens`.

    Args:
        family: `model_type` of a config, or name of a built-in.
    """
    return _import({**BACKBONES, **BUILT_IN}.get(family, GENERIC)).media_tokens.get(family)


def families_with_tokens() -> list[str]:
    """The families that `media_tokens` has tokens of."""
    paths = {GENERIC, *BACKBONES.values(), *BUILT_IN.values()}
    return sorted(family for path in paths for family in _import(path).media_tokens)


def _model_type(source: str, revision: str | None) -> str:
    folder = Path(source)
    if folder.is_dir():
        config = folder / "config.json"
        if not config.is_file() and (folder / "open_clip_config.json").is_file():
            return "open_clip"
        if not config.is_file():
            inside = [path.parent.name for name in CONFIGS for path in sorted(folder.glob(f"*/{name}"))]
            hint = f"; there is one in {folder / inside[-1]}" if inside else ""
            raise UserError(f"{folder}: not a checkpoint; expected config.json or embedder.json in this folder{hint}")
        return str(read_object(config).get("model_type", ""))
    if folder.exists() or source.startswith((".", "/", "~")):
        raise UserError(
            f"{source}: no such checkpoint folder; expected a folder, a hub id or one of {', '.join(KNOWN)}"
        )
    from vlm2vec.models.transformers_internals import model_type

    try:
        return model_type(source, revision)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"{source}: not a folder, not a built-in ({', '.join(KNOWN)}{did_you_mean(source, KNOWN)}), "
            f"and the hub returned an error: {first_line}"
        ) from error


def _import(path: str) -> type[Backbone]:
    module, _, name = path.partition(":")
    loaded: type[Backbone] = getattr(importlib.import_module(module), name)
    return loaded
