"""Reads the LoRA settings of a base that already has an adapter; training continues that adapter."""

from __future__ import annotations

from typing import Any

from vlm2vec.files import read_object
from vlm2vec.models.checkpoints.adapters import CONFIG_FILE, find_adapter

NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "dora": "use_dora"}


def adapter_settings(base: str) -> dict[str, Any] | None:
    """Returns the settings of the base's adapter as keys of a recipe's `lora` section; None if it has no adapter."""
    folder = find_adapter(base)
    if folder is None:
        return None
    about = read_object(folder / CONFIG_FILE)
    return {key: about[name] for key, name in NAMES.items() if name in about}
