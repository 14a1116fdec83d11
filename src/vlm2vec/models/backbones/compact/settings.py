"""Checks the settings of the built-in models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm2vec.errors import UserError, shown

SMALLEST_IMAGE = 32
"""Side of the image that gives one cell of EfficientNet's last map."""


def checked_settings(source: str, options: Mapping[str, Any], defaults: Mapping[str, int]) -> dict[str, int]:
    """The defaults, replaced by the user's settings.

    Args:
        source: Name of the model, for messages.
        options: Settings of the user.
        defaults: All settings with their defaults.

    Raises:
        UserError: for an unknown setting, and a value that is not a positive whole number.
    """
    if unknown := set(options) - set(defaults):
        raise UserError(f"{source}: unknown settings {', '.join(sorted(unknown))}; expected {', '.join(defaults)}")
    for name, value in options.items():
        least = SMALLEST_IMAGE if name == "image_size" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{source}: {name}={shown(value)}: expected a whole number of {least} or more")
    return {**defaults, **options}
