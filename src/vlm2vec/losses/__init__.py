"""Contrastive losses as pure functions of tensors; they depend on no model and no process group."""

from vlm2vec.losses.blocks import BLOCK_LOGITS, contrastive_loss, info_nce, matryoshka
from vlm2vec.losses.functions import LOSSES, LossFunction
from vlm2vec.losses.labels import NO_QUERY, Exclusions, Hardness, Labels, LossBlock, Reference

__all__ = [
    "BLOCK_LOGITS",
    "LOSSES",
    "NO_QUERY",
    "Exclusions",
    "Hardness",
    "Labels",
    "LossBlock",
    "LossFunction",
    "Reference",
    "contrastive_loss",
    "info_nce",
    "matryoshka",
]
