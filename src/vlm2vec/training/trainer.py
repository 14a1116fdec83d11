"""Runs the contrastive step in `transformers.Trainer`, which provides checkpoints, resuming, schedules and launching.

Shapes: B queries, M targets, D embedding dim.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch.distributed.tensor import DTensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from transformers import TrainerCallback, TrainingArguments

from vlm2vec.cache import cache_folder
from vlm2vec.data.collate import collate_pairs
from vlm2vec.data.examples import TrainExample
from vlm2vec.data.mixture import set_weights
from vlm2vec.data.sampler import BatchSampler
from vlm2vec.data.streams import StreamedSet
from vlm2vec.errors import UserError
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.reranking.pair_model import PairModel
from vlm2vec.models.vision.frozen_vision import FrozenVision, vision_fingerprint
from vlm2vec.models.vision.vision_cache import FeatureStore
from vlm2vec.training.chunks import ChunkBudget
from vlm2vec.training.config import Recipe, SetSettings, TrainSettings
from vlm2vec.training.data_checks import NegativeWatch
from vlm2vec.training.dora import norms_once
from vlm2vec.training.ema import MovingAverage
from vlm2vec.training.frozen_weights import FrozenCopies
from vlm2vec.training.gather import sum_over_ranks, world_size
from vlm2vec.training.guard import Guard
from vlm2vec.training.objective import Objective
from vlm2vec.training.precision import uses_bf16
from vlm2vec.training.prefetch import SAMPLE, prefetching
from vlm2vec.training.reference import ReferenceModel
from vlm2vec.training.step import ContrastiveStep, StepResult
from vlm2vec.training.trainer_internals import CheckpointingTrainer, on_one_gpu


class ContrastiveTrainer(CheckpointingTrainer):
    """Trains an `Embedder` with InfoNCE over the whole global batch.

    Args:
        embedder: The model with its adapters.
        recipe: The recipe.
        sets: Examples by set name; streamed sets are read in the data loader processes.
        folder: Folder of the step checkpoints.
        on_step: Called after each step with the number of completed steps.
        references: The loss's guide and teacher models, by the batch field that receives their vectors.
    """

    step_class: type[ContrastiveStep] = ContrastiveStep

    def __init__(
        self,
        embedder: Embedder | PairModel,
        recipe: Recipe,
        sets: Mapping[str, Sequence[TrainExample]],
        folder: Path,
        on_step: Callable[[int], None] = lambda step: None,
        references: Mapping[str, ReferenceModel] | None = None,
    ) -> None:
        self.recipe = recipe
        self.sets = sets
        self.references = references or {}
        self.embedder = embedder
        self.objective = self._make_objective().to(embedder.device)
        if self.objective.learns:
            embedder.objective = self.objective  # makes its parameters part of the model for optimizer and checkpoints
        self.vision = keep_vision(embedder, recipe)
        self.chunks = ChunkBudget(recipe, embedder.device)
        self.negatives = NegativeWatch()
        self.guard = Guard(recipe.guard, embedder.device)
        if recipe.data.num_workers:
            embedder.backbone.send_bytes()
        decay = recipe.train.ema_decay
        self.average = MovingAverage(embedder.backbone.named_parameters(), decay) if decay else None
        self._seen: dict[str, float] = {}
        super().__init__(
            model=embedder,
            args=_arguments(recipe, folder, embedder.device),
            train_dataset=ConcatDataset([cast(Dataset[TrainExample], examples) for examples in sets.values()]),
            callbacks=[_StepCallback(self._after_step(on_step))],
        )
        self.remove_callback(transformers.PrinterCallback)
        self.is_sharded = recipe.train.sharding == "full" and self.args.world_size > 1

    def _make_objective(self) -> Any:
        return Objective(self.recipe.loss, self.recipe.train.temperature, self.recipe.data.mask_equal_targets)

    def _after_step(self, on_step: Callable[[int], None]) -> Callable[[int], None]:
        def after(step: int) -> None:
            if self.average:
                self.average.update()
            on_step(step)

        return after

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns a loader whose single pass is the whole run, so that resuming only skips the first batches."""
        sizes = {name: len(examples) for name, examples in self.sets.items()}
        train = self.recipe.train
        sampler = BatchSampler(
            [
                examples.blocks if isinstance(examples, StreamedSet) else len(examples)
                for examples in self.sets.values()
            ],
            list(recipe_weights(self.recipe, sizes).values()),
            train.batch_size,
            train.steps,
            train.seed,
            self.recipe.data.batching,
            self.recipe.data.sub_batch_size,
            self.args.process_index,
            self.args.world_size,
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self._collate,
            **self._prefetching(sampler),
        )

    def _prefetching(self, sampler: BatchSampler) -> Any:
        data = self.recipe.data
        if not data.num_workers:
            return {}
        numbers = next(iter(sampler))
        some = [self.train_dataset[number] for number in numbers[:: -(-len(numbers) // SAMPLE)]]  # of every sub-batch
        return prefetching(data.num_workers, data.prefetch_gib, lambda x: self._collate(x)["pairs"], some, len(numbers))

    def _collate(self, examples: Sequence[TrainExample]) -> dict[str, Any]:
        # The base class looks for "labels" in the keys of a batch.
        process, merge_equal = self.embedder.backbone.process, self.recipe.train.merge_equal
        return {"pairs": collate_pairs(process, examples, merge_equal, bool(self.references))}

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Runs GradCache over the pairs of all ranks; the gradient is summed once, after the last chunk."""
        model.train()
        pairs = inputs["pairs"]
        for name, reference in self.references.items():
            setattr(pairs, name, reference.vectors(pairs.items))
        # DDP's hooks are off: they wait for a gradient of every parameter, but text-only chunks lack some gradients.
        unsynced = model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()

        def backward(settings: TrainSettings) -> StepResult:
            step: ContrastiveStep = self.step_class(
                model,
                self.objective,
                settings,
                self.embedder.device,
                self.vision,
                self.compute_loss_context_manager,
                self.is_sharded,
                self.args.bf16,
            )
            return step.backward(pairs, self.embedder.parameters())

        with unsynced, self._frozen.in_place(), norms_once(self.embedder):
            result = self.chunks.run(backward, self.embedder.zero_grad)
        self._check(result, pairs.origins)
        return result.loss

    @functools.cached_property
    def _frozen(self) -> FrozenCopies:
        uses_copies = self.args.bf16 and not self.is_sharded  # sharded parameters are cast when they are gathered
        return FrozenCopies(self.embedder, torch.bfloat16 if uses_copies else torch.float32)

    def _check(self, result: StepResult, origins: list[str]) -> None:
        gradients = [p.grad for p in self.embedder.parameters() if p.grad is not None]
        if self.is_sharded:  # each rank has only its shards
            gradients = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        squares = sum_over_ranks(torch.nn.utils.get_total_norm(gradients)) if gradients else torch.zeros(())
        finite = bool(torch.isfinite(squares))
        cosine = result.mean_cosine
        step, loss = self.state.global_step + 1, float(result.loss)
        self.guard.check(step, loss, finite, cosine, origins)
        if result.gathered is not None:
            self.negatives.check(step, loss, result.gathered, origins)
        self._seen = {"mean_cosine": round(cosine, 6), "memory_mib": round(self.guard.memory_mib)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the guard's measurements to each entry with a loss."""
        super().log({**logs, **self._seen} if "loss" in logs else logs, start_time)


class _StepCallback(TrainerCallback):
    def __init__(self, on_step: Callable[[int], None]) -> None:
        self.on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step(state.global_step)


def recipe_weights(recipe: Recipe, sizes: dict[str, int]) -> dict[str, float]:
    """Returns the sampling weight of each set: from the recipe, or by its size."""
    chosen = recipe.data.sets if isinstance(recipe.data.sets, dict) else {}
    given = {name: how.weight if isinstance(how, SetSettings) else how for name, how in chosen.items()}
    return set_weights(sizes, given, recipe.data.size_exponent)


def trackers(wanted: list[str] | None) -> list[str]:
    """Returns the trackers for `report_to`: as requested, or by default trackio if it is installed.

    Raises:
        UserError: for a tracker that transformers does not support or that is not installed.
    """
    if wanted is None:
        return ["trackio"] if importlib.util.find_spec("trackio") else []
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    try:
        get_reporting_integration_callbacks(wanted)
    except ValueError as error:
        raise UserError(f"train.report_to: {error}") from error
    for name in wanted:
        if name not in get_available_reporting_integrations():
            raise UserError(f"train.report_to: {name} is not installed: pip install {name}")
    return wanted


def keep_vision(embedder: Embedder | PairModel, recipe: Recipe) -> FrozenVision | None:
    """Sets up a frozen vision encoder to run once per step or once per image; returns None if that is impossible."""
    how, backbone = recipe.train.reuse_vision, embedder.backbone
    model = backbone.model
    if how == "no" or not FrozenVision.possible(model):
        return None
    if how == "step":
        return FrozenVision(model)
    precision = str(torch.bfloat16 if uses_bf16(recipe, embedder.device) else embedder.dtype)
    folder = cache_folder() / "vision"
    return FrozenVision(model, FeatureStore(folder, vision_fingerprint(model, backbone.language_parts(), precision)))


def _arguments(recipe: Recipe, folder: Path, device: torch.device) -> TrainingArguments:
    train = recipe.train
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size // world_size(),
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        bf16=uses_bf16(recipe, device),
        use_cpu=device.type == "cpu",
        seed=train.seed,
        logging_steps=train.log_steps,
        save_steps=train.save_steps,
        save_total_limit=2,
        report_to=trackers(train.report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    return on_one_gpu(arguments)
