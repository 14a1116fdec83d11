"""Built-in models that others replaced: their names, and folders trained on them, are refused in one line."""

from __future__ import annotations

from pathlib import Path

from vlm2vec.errors import UserError

REPLACED = {"compact-embed": "compact", "compact-sentence": "compact", "compact-sentence-dual": "compact-dual"}
"""The model to use instead, by name."""
REUSED = ("compact", "compact-dual")
"""Names that once were those of models on a decoder, and now are those of models on a sentence encoder."""
DECODER_LAYERS = "language_model.layers."  # in the names of a decoder's weights; a sentence encoder has encoder.layer


def refuse_replaced(source: str) -> None:
    """Refuses the name of a model that was replaced. A folder of that name is left alone.

    Raises:
        UserError: with the name of the model to use instead.
    """
    if source in REPLACED and not Path(source).exists():
        raise UserError(
            f"{source}: this built-in model was replaced by {REPLACED[source]}; use {REPLACED[source]}, and index "
            "stores made with it again"
        )


def refuse_weights_of_replaced(weights: Path, base: str) -> None:
    """Refuses a folder whose weights were trained on a built-in model that was replaced, maybe by one of its name.

    Args:
        weights: Its safetensors file, of which the names of the tensors are read.
        base: Name of the base model in the folder.

    Raises:
        UserError: naming the folder and what to do.
    """
    is_named = base in REPLACED and not Path(base).exists()
    if is_named or (base in REUSED and _has_decoder(weights)):
        new = REPLACED.get(base, base)
        raise UserError(
            f"{weights.parent}: was trained on an earlier built-in model {base}, which was replaced; train again with "
            f"{new} as it is now, and index stores made with this folder again"
        )


def _has_decoder(weights: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    if not weights.is_file():
        return False
    try:
        with safe_open(weights, framework="numpy") as file:
            return any(DECODER_LAYERS in name for name in file.keys())  # noqa: SIM118 - no mapping
    except SafetensorError:  # loading says what is wrong with the file
        return False
