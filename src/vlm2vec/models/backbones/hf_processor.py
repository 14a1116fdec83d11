"""A family's own processor of transformers, with PIL for images and without the parts that require torchvision."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import transformers

from vlm2vec.errors import UserError, shown
from vlm2vec.models.transformers_internals import build_processor, image_setting_names, processor_parts
from vlm2vec.models.vision.resolution import SIDES, image_settings, side_of

logger = logging.getLogger(__name__)
SETTINGS: dict[str, Sequence[Any]] = {
    "padding_side": ("right", "left"),
    "positions": ("auto", "text", "vision-start", "multimodal"),
    "image_backend": ("pil", "torchvision"),
    "video": ("native", "images"),
    "num_frames": range(1, 769),
    "max_length": range(1, 10**6),
    "resolution": tuple(SIDES),
    "final_norm": (True, False),
}


def current_names(options: dict[str, Any]) -> dict[str, Any]:
    """The settings with deprecated values replaced by today's, each with a warning."""
    if options.get("video") != "pictures":
        return options
    logger.warning("setting video=pictures is deprecated; use video=images")
    return {**options, "video": "images"}


def load_processor(source: str, common: dict[str, Any], options: dict[str, Any]) -> Any:
    """The processor without its video part, which requires torchvision, and its audio part.

    Images are processed by PIL, so that vectors do not depend on whether torchvision is installed.

    Args:
        source: A folder or hub id.
        common: Revision and trust, for every part.
        options: Settings of `Generic` and of the image processor.

    Raises:
        UserError: for a setting that neither has.
    """
    images = load_image_processor(source, common, options)
    family, saved = processor_parts(source, common)
    parts = {"image_processor": images, "tokenizer": transformers.AutoTokenizer.from_pretrained(source, **common)}
    return build_processor(family, parts, saved)


def load_image_processor(source: str, common: dict[str, Any], options: dict[str, Any]) -> Any:
    """The image processor with these settings.

    Raises:
        UserError: for a setting that neither it nor `Generic` has.
    """
    side, backend = side_of(options), options.get("image_backend", "pil")
    if backend == "torchvision" and not transformers.utils.is_torchvision_available():
        raise UserError("image_backend=torchvision: torchvision is not installed, or does not work with this torch")
    settings = {name: value for name, value in options.items() if name not in SETTINGS}

    def load(**more: Any) -> Any:
        return transformers.AutoImageProcessor.from_pretrained(source, backend=backend, **common, **settings, **more)

    for name, value in options.items():
        if name in SETTINGS and value not in SETTINGS[name]:
            raise UserError(f"setting {name}={shown(value)}: expected {_in_words(SETTINGS[name])}")
    images = load()
    own = image_setting_names(images)
    for name in options:
        if name not in SETTINGS and name not in own and name != "max_pixels":
            raise UserError(f"setting {name}: not one of {', '.join(sorted({*SETTINGS, *own}))}")
    if side is None or ("max_pixels" in options and "max_pixels" in own):
        return images
    settings.pop("max_pixels", None)
    return load(**image_settings(images, side))


def _in_words(values: Sequence[Any]) -> str:
    return f"{values[0]} to {values[-1]}" if isinstance(values[0], int) else ", ".join(values)
