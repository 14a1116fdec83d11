"""Collects all uses of undocumented API of transformers and PEFT in training.

These are the methods of `transformers.Trainer` that `CheckpointingTrainer` overrides, and the DoRA layers of PEFT. The
tables below list each name with its parameters. tests/training/test_trainer_internals.py reports names that a new
version has removed, changed or stopped calling.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from vlm2vec.files import named_errors, write_json, write_text
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.reranking.pair_model import PairModel
from vlm2vec.training import sharding
from vlm2vec.training.config import Recipe, dump_recipe
from vlm2vec.training.ema import MovingAverage
from vlm2vec.training.gather import barrier
from vlm2vec.training.objective import Objective

PRIVATE = {
    "_get_output_dir": ("trial",),
    "_save_checkpoint": ("model", "trial"),
    "_save": ("output_dir", "state_dict"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
}
"""Overridden methods of the Trainer with their parameters."""
PRIVATE_ATTRIBUTES = ("is_distributed_loading_by_transformers",)
"""Attributes of the Trainer that this module sets."""
PEFT_METHODS = {
    "get_lora_weight": {"lora_A", "lora_B", "adapter_name"},
    "get_weight_norm": {"weight", "lora_weight", "scaling", "adapter_name"},
}
"""Methods of PEFT's `DoraLinearLayer` that `training/dora.py` replaces during a step, with parameters that PEFT names
in its calls."""

EXTRA_FILE = "training_state.safetensors"
RECIPE_FILE, PAIRS_FILE = "recipe.yaml", "pairs.json"
OPTIMIZER_NAME, SCHEDULER_NAME = STATES = "optimizer.pt", "scheduler.pt"
WRITING = ".writing"
"""Temporary folder of a step checkpoint until it is complete."""


def on_one_gpu(arguments: transformers.TrainingArguments) -> transformers.TrainingArguments:
    """Keeps the Trainer from using nn.DataParallel on several GPUs, which cannot scatter a `PairBatch`."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def dora_layers(model: torch.nn.Module) -> list[Any]:
    """Returns the modules in which PEFT computes DoRA norms of linear layers; they have `PEFT_METHODS`."""
    from peft.tuners.lora.dora import DoraLinearLayer

    return [module for module in model.modules() if type(module) is DoraLinearLayer]


def step_checkpoints(folder: Path) -> list[Path]:
    """Returns the step checkpoints in a folder, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


class CheckpointingTrainer(transformers.Trainer):
    """A Trainer whose step checkpoints are either complete or absent and independent of the number of ranks.

    Subclasses must set the attributes before calling `__init__`.
    """

    embedder: Embedder | PairModel
    recipe: Recipe
    sets: Mapping[str, Sized]
    objective: Objective
    average: MovingAverage | None
    is_sharded: bool
    _is_writing = False

    def _get_output_dir(self, trial: Any = None) -> str:
        folder: str = super()._get_output_dir(trial=trial)
        return str(Path(folder) / WRITING) if self._is_writing else folder

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Writes to a temporary folder and renames it, so that a kill never leaves an incomplete checkpoint."""
        final = Path(self.args.output_dir)
        beside = final / WRITING
        if self.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)
        barrier()
        self._is_writing = True
        try:
            with named_errors(final):
                super()._save_checkpoint(model, trial)
        finally:
            self._is_writing = False
        barrier()
        if self.args.should_save:
            for folder in beside.iterdir():
                shutil.rmtree(final / folder.name, ignore_errors=True)
                folder.rename(final / folder.name)
            beside.rmdir()
            for old in step_checkpoints(final)[: -self.args.save_total_limit]:
                shutil.rmtree(old)
        barrier()

    def whole_state(self) -> dict[str, torch.Tensor] | None:
        """Gathers sharded backbone weights on rank 0; returns None if not sharded. Every rank must call it."""
        return sharding.whole_state(self.embedder.backbone.model) if self.is_sharded else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the complete model, sharded or not."""
        state = self.whole_state()
        if self.args.should_save:
            self._save(output_dir, state)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.embedder.write_files(folder, state=state_dict)
        if extra := self._extra_state():
            save_file(extra, folder / EXTRA_FILE)
        write_text(folder / RECIPE_FILE, dump_recipe(self.recipe))
        write_json(folder / PAIRS_FILE, {name: len(examples) for name, examples in self.sets.items()})

    def _extra_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Returns trained parameters outside the backbone, by their name in a step checkpoint."""
        return {f"objective.{name}": value for name, value in self.objective.named_parameters()}

    def _extra_state(self) -> dict[str, torch.Tensor]:
        """Returns the additional state of a step checkpoint: parameters of the loss and the moving average."""
        state = {name: value.detach().clone() for name, value in self._extra_parameters().items()}
        if self.average:
            state |= {f"average.{name}": value.cpu().contiguous() for name, value in self.average.state.items()}
        return state

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Writes the complete state by parameter name, so that another number of ranks can resume from it."""
        state = sharding.optimizer_state(self.embedder, self._plain_optimizer())
        if self.args.should_save:
            parts = {OPTIMIZER_NAME: state, SCHEDULER_NAME: self.lr_scheduler.state_dict()}
            for name, part in parts.items():  # a file of Python raises the system's error; torch's own writer does not
                with (Path(output_dir) / name).open("wb") as file:
                    torch.save(part, file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        saved, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True) for name in STATES
        )
        optimizer = self._plain_optimizer()
        sharding.load_optimizer_state(self.embedder, optimizer, saved)
        # The step comes from the checkpoint, the learning rate and its schedule from the current recipe.
        scheduler = self.lr_scheduler
        rates = [
            rate * factor(schedule["last_epoch"])
            for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        scheduler.load_state_dict({**schedule, "base_lrs": scheduler.base_lrs, "_last_lr": rates})
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        wrapped: Any = self.optimizer
        optimizer: torch.optim.Optimizer = getattr(wrapped, "optimizer", wrapped)
        return optimizer

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Trains. Weights are loaded before they are sharded."""
        if resume_from_checkpoint is not None:
            self._load_step(Path(resume_from_checkpoint))
        if self.is_sharded:
            sharding.shard(self.embedder, self.objective.parameters(), in_half=self.args.bf16)
            self.is_distributed_loading_by_transformers = True  # the Trainer then neither wraps nor moves it
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Does nothing: `train` has already loaded the weights."""

    def _load_step(self, folder: Path) -> None:
        load = checkpoint.load_adapter if self.recipe.lora else checkpoint.load_weights
        load(self.embedder.backbone, folder)
        present = self._extra_state()
        if present:
            saved = load_file(folder / EXTRA_FILE)
            with torch.no_grad():
                for name, parameter in self._extra_parameters().items():
                    parameter.copy_(saved[name])
            if self.average:
                for name, value in self.average.state.items():
                    value.copy_(saved[f"average.{name}"])
