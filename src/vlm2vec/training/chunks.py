"""Chooses the number of tokens per mini-batch: from the recipe, or from the planner, halved once on out of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from vlm2vec.errors import UserError
from vlm2vec.planning.cost import GIB, WEIGHT_BYTES, Inputs, Training
from vlm2vec.planning.geometry import geometry_of
from vlm2vec.planning.plan import LEAST_CHUNK, chunk_tokens_for
from vlm2vec.training.config import Recipe, TrainSettings
from vlm2vec.training.gather import world_size

R = TypeVar("R")
CPU_TOKENS, UNKNOWN_TOKENS = 2048, 4096
logger = logging.getLogger(__name__)


def training_of(recipe: Recipe, chunk_tokens: int = 8192) -> Training:
    """Returns the settings of a recipe that determine its cost.

    Args:
        recipe: The recipe.
        chunk_tokens: Tokens per mini-batch to use if the recipe says "auto" or null.
    """
    train, lora = recipe.train, recipe.lora
    return Training(
        pairs=train.batch_size,
        steps=train.steps,
        chunk_tokens=train.chunk_tokens if isinstance(train.chunk_tokens, int) else chunk_tokens,
        rank=lora.rank if lora else 0,
        dropout=lora.dropout if lora else 0.0,
        dora=bool(lora and lora.dora),
        checkpointing=recipe.model.gradient_checkpointing,
        reuses_vision=train.reuse_vision != "no",
        sharded=train.sharding == "full",
        weight_bytes=WEIGHT_BYTES.get(recipe.model.quantize or "", 2.0),
    )


def chunk_tokens_of(recipe: Recipe, device: torch.device) -> int | None:
    """Returns the tokens per mini-batch. "auto" is the largest power of two that fits the GPU's memory by the plan.

    On a CPU, "auto" is 2,048; on a GPU with a model whose sizes the planner does not know, it is 4,096.
    """
    wanted = recipe.train.chunk_tokens
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return CPU_TOKENS
    try:
        model = geometry_of(recipe.model.base, recipe.model.options)
    except UserError:
        return UNKNOWN_TOKENS
    _, total = torch.cuda.mem_get_info(device)
    found = chunk_tokens_for(model, training_of(recipe), Inputs(), total / GIB, world_size())
    logger.info("train.chunk_tokens auto: %s, planned for %.1f GiB", found or LEAST_CHUNK, total / GIB)
    return found or LEAST_CHUNK


class ChunkBudget:
    """Manages the number of tokens per mini-batch during a run.

    Args:
        recipe: The recipe.
        device: Device of the model.

    Attributes:
        settings: The `train` section of the recipe with "auto" replaced by a number of tokens.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.automatic = recipe.train.chunk_tokens == "auto"
        self.settings = recipe.train.model_copy(update={"chunk_tokens": chunk_tokens_of(recipe, device)})

    def run(self, step: Callable[[TrainSettings], R], clear: Callable[[], None]) -> R:
        """Runs a step. On out of memory, an automatic number of tokens is halved once for the rest of the run.

        With several ranks the error is raised instead, because the other ranks already wait in a collective.

        Args:
            step: Computes the gradients with the given settings.
            clear: Drops the gradients of an interrupted step.

        Raises:
            UserError: if the memory is insufficient.
        """
        try:
            return step(self.settings)
        except torch.OutOfMemoryError as error:
            tokens = self.settings.chunk_tokens
            if not self.automatic or world_size() > 1 or not isinstance(tokens, int):
                raise UserError(
                    f"train.chunk_tokens {tokens}: out of GPU memory; halve it, or set "
                    "model.gradient_checkpointing=true"
                ) from error
        clear()
        torch.cuda.empty_cache()
        self.automatic = False
        self.settings = self.settings.model_copy(update={"chunk_tokens": tokens // 2})
        logger.warning("out of GPU memory with train.chunk_tokens %d; continuing with %d", tokens, tokens // 2)
        return self.run(step, clear)
