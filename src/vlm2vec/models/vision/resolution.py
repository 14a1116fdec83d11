"""Named image sizes, translated to the settings of each family's image processor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlm2vec.errors import UserError, shown
from vlm2vec.models.transformers_internals import image_setting_names

SIDES = {"low": 336, "mid": 672, "high": 1344}
BOUNDS = ("min_pixels", "max_pixels")


def merged(saved: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint, overridden by the user's. A named size replaces pixel bounds, and bounds a named size.

    Args:
        saved: Settings of the checkpoint.
        said: Settings of the user.
    """
    dropped: tuple[str, ...] = ()
    if "resolution" in said:
        dropped = BOUNDS
    elif any(name in said for name in BOUNDS):
        dropped = ("resolution",)
    return {**{name: value for name, value in saved.items() if name not in dropped}, **said}


def side_of(options: Mapping[str, Any]) -> int | None:
    """Side of a square with the maximum number of pixels of an image. None if the settings have no limit.

    Raises:
        UserError: for an unknown name, an invalid number, or both kinds of limit at once.
    """
    name, most = options.get("resolution"), options.get("max_pixels")
    if name is None and most is None:
        return None
    if name is not None and any(bound in options for bound in BOUNDS):
        raise UserError("resolution: cannot be combined with min_pixels or max_pixels; remove one of them")
    if name is not None and name not in SIDES:
        raise UserError(f"resolution={shown(name)}: expected {', '.join(SIDES)}, or max_pixels")
    if name is None and (not isinstance(most, int) or most < 1):
        raise UserError(f"max_pixels={shown(most)}: expected a positive number of pixels")
    return SIDES[name] if name is not None else math.isqrt(int(most or 0))


def image_settings(processor: Any, side: int) -> dict[str, Any]:
    """Settings of an image processor that limit images to about side x side pixels.

    Args:
        processor: An image processor of transformers with the settings of its folder.
        side: See `side_of`.

    Raises:
        UserError: for a processor whose output has a fixed size.
    """
    about = processor.to_dict()
    size = dict(about.get("size") or {})
    tile = size.get("height") or size.get("shortest_edge") or 0
    if "max_pixels" in image_setting_names(processor):
        return {"size": {**size, "shortest_edge": min(size["shortest_edge"], side * side), "longest_edge": side * side}}
    if about.get("image_grid_pinpoints"):  # sizes of grids of tiles
        fitting = [grid for grid in about["image_grid_pinpoints"] if max(grid) <= side]
        return {"image_grid_pinpoints": fitting or [[tile, tile]]}
    if about.get("max_patches"):
        return {"max_patches": max(1, (side // tile) ** 2)}
    if size.get("longest_edge"):
        whole = (about.get("max_image_size") or {}).get("longest_edge") or 1  # side of a tile
        bounded = {name: min(value, side) for name, value in size.items() if name == "shortest_edge" and value}
        return {"size": {**bounded, "longest_edge": max(1, side // whole) * whole}}
    raise UserError(f"resolution: images of this family have a fixed size ({size or 'its own'}); remove the setting")
