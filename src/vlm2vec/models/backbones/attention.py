"""Which tokens a decoder's tokens attend to: the family's own mask, or all tokens except padding.

transformers makes the mask of a decoder from its configuration. Where `is_causal` is false there, `create_causal_mask`
masks padding only. Attention layers read a flag of the same name if there is no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError

ATTENTIONS = ("causal", "bidirectional")
MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Values of `layer_types` in a configuration whose layers mix tokens by masked attention only."""


def layers_without_mask(language_model: nn.Module) -> list[str]:
    """Kinds of layers that read in one direction whatever the mask, such as linear attention or convolution."""
    config: Any = language_model.config
    return sorted(set(getattr(config, "layer_types", None) or ()) - MASKED_LAYERS)


def set_causal(language_model: nn.Module, is_causal: bool) -> None:
    """Sets the flag of the configuration and of every attention layer."""
    config: Any = language_model.config
    config.is_causal = is_causal
    for module in language_model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = is_causal  # type: ignore[assignment]


@torch.no_grad()
def first_token_reads_last(backbone: Any, batch: Batch) -> bool:
    """Whether the state of the first token depends on the last token.

    Args:
        backbone: A `DecoderBackbone`.
        batch: One text of at least two tokens.

    Raises:
        UserError: if the text has fewer.
    """
    ids_1L = batch["input_ids"]
    if ids_1L.shape[1] < 2:
        raise UserError(f"{backbone.name}: the text to test the attention with has {ids_1L.shape[1]} tokens")
    states = []
    for last in sorted({int(ids_1L[0, 0]), int(ids_1L[0, -1])} | {1, 2})[:2]:
        changed_1L = ids_1L.clone()
        changed_1L[0, -1] = last
        changed = Batch({**batch.tensors, "input_ids": changed_1L}, batch.rows, batch.padded, batch.fill, batch.left)
        states.append(backbone.hidden_states(changed.to(ids_1L.device))[0, 0])
    return not torch.equal(states[0], states[1])
