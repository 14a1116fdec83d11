"""Loads the weights of a vision-language model by transformers and checks that none is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import transformers

from vlm2vec.errors import UserError
from vlm2vec.models.transformers_internals import only_errors

logger = logging.getLogger(__name__)


def load_network(source: str, settings: dict[str, Any]) -> Any:
    """Loads a network without its language-model head; warns of other weights for which it has no place.

    Args:
        source: A folder or hub id.
        settings: Further arguments of transformers' `from_pretrained`.

    Raises:
        UserError: naming a weight that the files lack, or that has another shape.
    """
    settings = {**settings, "ignore_mismatched_sizes": True}  # the report names the weight, an exception does not
    with only_errors():  # transformers reports on the head, which is left out on purpose
        model, report = transformers.AutoModel.from_pretrained(source, output_loading_info=True, **settings)
        # transformers 5.23 finds the vision weights of newer Qwen2-VL files only for the class with the head.
        if report["missing_keys"] and report["unexpected_keys"]:
            del model  # before the second load: memory need not hold both
            with_head = transformers.AutoModelForImageTextToText
            whole, report = with_head.from_pretrained(source, output_loading_info=True, **settings)
            model = whole.base_model
    if report["mismatched_keys"]:
        name, found, expected = min(report["mismatched_keys"])
        raise UserError(f"weight {name} has the shape {list(found)}: expected {list(expected)}, as config.json says")
    missing, unused = (_without_head(report[f"{which}_keys"]) for which in ("missing", "unexpected"))
    if missing:
        raise UserError(f"weight {missing[0]} is missing")
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        logger.warning("%s: ignored weights that have no place in the model: %s%s", source, unused[0], more)
    return model


def _without_head(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if "lm_head" not in name.split("."))
