"""Builds the model that a recipe trains."""

from __future__ import annotations

from dataclasses import replace

import torch

from vlm2vec.cache import cache_folder
from vlm2vec.errors import UserError
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.device import process_device
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.reranking.pair_model import PairModel
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.training.attention import check_kernel, use_kernel
from vlm2vec.training.components import freeze_other, linear_layers
from vlm2vec.training.config import Recipe
from vlm2vec.training.precision import base_dtype, train_in_float32
from vlm2vec.training.quantized_base import quantize_base


def build_embedder(recipe: Recipe) -> Embedder:
    """Builds the recipe's model with adapters; the initialization of new weights depends only on the recipe's seed."""
    torch.manual_seed(recipe.train.seed)
    settings = recipe.model
    device = process_device()
    check_kernel(settings.attention_kernel, device)
    # A base that is quantized never is on the GPU as a whole: it need not fit there in full precision.
    loads_on = torch.device("cpu") if settings.quantize else device
    embedder = Embedder.from_pretrained(
        settings.base, dtype=base_dtype(recipe, device), device=loads_on, revision=settings.revision, **settings.options
    )
    if settings.pooling:
        embedder.backbone.pooling = settings.pooling
    if settings.quantize:
        quantize_base(embedder.backbone, settings.quantize, device)
        embedder.to(device)
    if settings.attention:
        embedder.backbone.attention = settings.attention
    use_kernel(embedder.backbone, settings.attention_kernel)
    components, lora = settings.components, recipe.lora
    if lora:
        targets = lora.targets or (linear_layers(embedder.backbone, components) if components else None)
        checkpoint.add_adapter(embedder.backbone, lora.rank, lora.alpha, lora.dropout, targets, lora.dora)
        train_in_float32(embedder)
    elif checkpoint.has_adapter(embedder.backbone):
        raise UserError(f"model.base: {settings.base} has an adapter; merge it first (vlm2vec export --to merged)")
    elif components:
        freeze_other(embedder.backbone, components)
    if settings.gradient_checkpointing:
        embedder.backbone.enable_gradient_checkpointing()
    embedder.backbone.cache_images(cache_folder() / "vision")
    return embedder


def build_reranker(recipe: Recipe) -> PairModel:
    """Builds the recipe's model with adapters as a reranker; a model without a language-model head gets a scalar head.

    Raises:
        UserError: as `build_embedder`, or for a dual encoder.
    """
    given = {name: value for name, value in recipe.rerank.prompt if value is not None}
    return PairModel.of(build_embedder(recipe), replace(RerankPrompt(), **given), recipe.rerank.head)
