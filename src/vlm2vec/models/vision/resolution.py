"""How large images reach a model: named sizes, told to each family's image processor in its own words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlm2vec.errors import UserError
from vlm2vec.models.transformers_internals import image_setting_names

SIDES = {"low": 336, "mid": 672, "high": 1344}
BOUNDS = ("min_pixels", "max_pixels")


def merged(saved: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint with those that the user says: a named size replaces bounds, bounds a named size."""
    dropped: tuple[str, ...] = ()
    if "resolution" in said:
        dropped = BOUNDS
    elif any(name in said for name in BOUNDS):
        dropped = ("resolution",)
    return {**{name: value for name, value in saved.items() if name not in dropped}, **said}


def side_of(options: Mapping[str, Any]) -> int | None:
    """The side of a square of as many pixels as an image may have; None where nothing is said.

    Raises:
        UserError: for an unknown name, a number that is none, or two bounds at once.
    """
    name, most = options.get("resolution"), options.get("max_pixels")
    if name is None and most is None:
        return None
    if name is not None and any(bound in options for bound in BOUNDS):
        raise UserError("resolution and min_pixels or max_pixels: give one of them")
    if name is not None and name not in SIDES:
        raise UserError(f"resolution={name!r}: expected {', '.join(SIDES)}, or max_pixels")
    if name is None and (not isinstance(most, int) or most < 1):
        raise UserError(f"max_pixels={most!r}: expected a number of pixels")
    return SIDES[name] if name is not None else math.isqrt(int(most or 0))


def image_settings(processor: Any, side: int) -> dict[str, Any]:
    """What an image processor is told so that an image has at most about side x side pixels.

    Args:
        processor: An image processor of transformers, as its folder has it.
        side: See `side_of`.

    Raises:
        UserError: for a processor that makes one size of every image.
    """
    about = processor.to_dict()
    size = dict(about.get("size") or {})
    tile = size.get("height") or size.get("shortest_edge") or 0
    if "max_pixels" in image_setting_names(processor):
        return {"size": {**size, "shortest_edge": min(size["shortest_edge"], side * side), "longest_edge": side * side}}
    if about.get("image_grid_pinpoints"):  # sizes that tiles make together
        fitting = [grid for grid in about["image_grid_pinpoints"] if max(grid) <= side]
        return {"image_grid_pinpoints": fitting or [[tile, tile]]}
    if about.get("max_patches"):
        return {"max_patches": max(1, (side // tile) ** 2)}
    if size.get("longest_edge"):
        whole = (about.get("max_image_size") or {}).get("longest_edge") or 1  # tiles of this side
        bounded = {name: min(value, side) for name, value in size.items() if name == "shortest_edge" and value}
        return {"size": {**bounded, "longest_edge": max(1, side // whole) * whole}}
    raise UserError(f"resolution: pictures of this family have one size ({size or 'its own'}); leave the setting out")
