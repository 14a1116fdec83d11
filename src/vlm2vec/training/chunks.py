"""Tokens of a mini-batch: as the recipe says, or as the plan finds to fit the GPU, halved once if that is too many."""

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
    """The settings of a recipe that decide its cost; `chunk_tokens` where it leaves them to the plan or sets none."""
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
    """Tokens of a mini-batch. "auto" is the largest power of two that the plan finds to fit the GPU's memory.

    On a CPU, "auto" is 2,048; on a GPU with a model whose sizes the planner does not know, 4,096.
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
    """The tokens of a run's mini-batches.

    Args:
        recipe: Settings.
        device: Of the model.

    Attributes:
        settings: The recipe's, with a number of tokens in place of "auto".
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.automatic = recipe.train.chunk_tokens == "auto"
        self.settings = recipe.train.model_copy(update={"chunk_tokens": chunk_tokens_of(recipe, device)})

    def run(self, step: Callable[[TrainSettings], R], clear: Callable[[], None]) -> R:
        """Runs a step. If memory does not suffice and the number was automatic, it is halved once for the whole run.

        With several ranks the others would wait for this one's first try, so the error is raised.

        Args:
            step: Gradients by these settings.
            clear: Drops the gradients of an interrupted step.

        Raises:
            UserError: if memory does not suffice.
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
