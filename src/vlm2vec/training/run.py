"""Runs a whole training: reads the data, checks it, trains and saves. Independent of the command line."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from vlm2vec.data.examples import TrainExample
from vlm2vec.data.mixture import capped
from vlm2vec.data.mmeb.images import WORDINGS, list_sets
from vlm2vec.data.mmeb.train_rows import TrainRows, read_train_set
from vlm2vec.data.streams import StreamedSet, streamed_sets
from vlm2vec.errors import UserError
from vlm2vec.files import named_errors, write_json
from vlm2vec.media.images import ImageRef
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.checkpoints.card import write_card
from vlm2vec.models.device import idle_gpus
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.encoding.settings import EncodingModel
from vlm2vec.models.reranking.pair_model import PairModel
from vlm2vec.models.verification.golden import write_golden
from vlm2vec.progress import progress_bar
from vlm2vec.training.building import build_embedder, build_reranker
from vlm2vec.training.check_images import read_images
from vlm2vec.training.config import Recipe, SetSettings, dump_recipe
from vlm2vec.training.data_checks import check_negatives, check_scores
from vlm2vec.training.gather import join_ranks
from vlm2vec.training.output import CHECKPOINTS, check_new, read_history
from vlm2vec.training.reference import open_references
from vlm2vec.training.report import RunFacts, write_report
from vlm2vec.training.rerank import RerankTrainer
from vlm2vec.training.resume import changed_pairs, check_resume
from vlm2vec.training.trainer import ContrastiveTrainer
from vlm2vec.training.trainer_internals import step_checkpoints

LOG_FILE = "log.json"
REPORT_FILE = "report.html"
logger = logging.getLogger(__name__)
Sets = Mapping[str, Sequence[TrainExample]]
TASKS: dict[str, tuple[Callable[[Recipe], Any], type[ContrastiveTrainer]]] = {
    "embed": (build_embedder, ContrastiveTrainer),
    "rerank": (build_reranker, RerankTrainer),
}
"""What builds the model and what trains it, by the `task` of a recipe."""


def read_sets(recipe: Recipe, limit: int | None = None) -> Sets:
    """Opens the sets that the recipe names: sets in the MMEB-train layout are read into memory, others are streamed.

    Args:
        recipe: The recipe.
        limit: Read only the first rows of each file in the MMEB-train layout, up to this number. Default: all.

    Raises:
        UserError: see `read_train_set` and `StreamedSet`.
    """
    root = recipe.data.root
    files = WORDINGS[recipe.data.instructions]
    names = list(recipe.data.sets) if recipe.data.sets else sorted({*streamed_sets(root), *_listed(root, files)})
    return {name: _read_set(recipe, name, limit) for name in names}


def _listed(root: Path, files: str) -> list[str]:
    return [] if streamed_sets(root) and not any(root.glob(f"*/{files}")) else list_sets(root, files)


def _read_set(recipe: Recipe, name: str, limit: int | None) -> Sequence[TrainExample]:
    data, cap = recipe.data, pair_limit(recipe, name)
    given = data.sets.get(name) if isinstance(data.sets, dict) else None
    own = given if isinstance(given, SetSettings) else SetSettings()
    streamed = streamed_sets(data.root)
    if name not in streamed:

        def choose(number: int) -> Sequence[int]:
            return range(number) if cap is None else capped(range(number), cap, recipe.train.seed, name)

        rows = read_train_set(data.root, name, data.use_negatives, data.instructions, limit, choose)
        rows = rows.with_reference_negatives() if own.reference_negative else rows
        return _with_target_instruction(rows, own.target_instruction) if own.target_instruction else rows
    settings = (data.use_negatives, own.target_instruction, own.reference_negative)
    examples = StreamedSet(streamed[name], name, None, *settings)
    if cap is None or len(examples) <= cap:
        return examples
    return examples.only(capped(range(len(examples)), cap, recipe.train.seed, name))


def _with_target_instruction(rows: TrainRows, instruction: str) -> TrainRows:
    found, num_verbatim = rows.with_target_instruction(instruction)
    if num_verbatim:
        logger.warning(
            "%s: target_instruction does not apply to %d of %d targets, which are verbatim prompts (<|image_1|>)",
            rows.name,
            num_verbatim,
            len(found),
        )
    return found


def pair_limit(recipe: Recipe, name: str) -> int | None:
    """Returns the maximum number of pairs of a set that the recipe uses; None: all."""
    own = recipe.data.sets.get(name) if isinstance(recipe.data.sets, dict) else None
    return own.max_pairs if isinstance(own, SetSettings) and own.max_pairs else recipe.data.max_pairs


def check_images(embedder: EncodingModel, sets: Sets, on_bad_image: str, decode: bool = False) -> Sets:
    """Checks every image once before the first step and caches the outputs of a frozen vision encoder.

    Streamed sets are not checked; an unreadable image in such a set stops the run at its step.

    Returns:
        The sets; if `on_bad_image` is "skip", without the pairs with unreadable images.

    Raises:
        UserError: for the first unreadable image if `on_bad_image` is "stop", or if no pair of a set remains.
    """
    streamed = [name for name, examples in sets.items() if isinstance(examples, StreamedSet)]
    if streamed and on_bad_image == "skip":
        raise UserError(f"data.on_bad_image: skip does not support streamed sets ({', '.join(streamed)}); use stop")
    whole = {name: examples for name, examples in sets.items() if isinstance(examples, TrainRows)}
    images = chain.from_iterable(examples.images() for examples in whole.values())
    with progress_bar("checking images", None) as advance:
        bad = read_images(embedder, images, advance, decode=decode, skip=on_bad_image == "skip")
    return {**sets, **{name: _without(rows, bad) for name, rows in whole.items()}} if bad else sets


def _without(rows: TrainRows, bad: Mapping[ImageRef, UserError]) -> TrainRows:
    """Returns the pairs of a set whose images are readable.

    Raises:
        UserError: if there are none.
    """
    kept: list[int] = []
    reasons: list[UserError] = []
    for place, example in enumerate(rows):
        found = next((bad[image] for image in example_images(example) if image in bad), None)
        if found is None:
            kept.append(place)
        else:
            reasons.append(found)
    if reasons:
        count = len(reasons)
        logger.warning("%s: %d pairs left out for unreadable images; the first: %s", rows.name, count, reasons[0])
    if not kept:
        raise UserError(f"{rows.name}: no pair with readable images is left")
    return rows.only(kept)


def example_images(example: TrainExample) -> Iterable[ImageRef]:
    """Yields all images of an example's query, targets and negatives."""
    for item in (example.query, *example.targets, *example.negatives):
        yield from item.images


def train(recipe: Recipe, resume: bool = False, monitor: Callable[[Embedder, int], None] | None = None) -> Path:
    """Runs a recipe to its end and returns the run's folder, a checkpoint.

    `Embedder.from_pretrained` loads it, or `Reranker.from_pretrained` if the recipe's task is rerank.

    Args:
        recipe: The recipe; its resolved form is saved with the run.
        resume: Continue from the run's last step checkpoint.
        monitor: Called on every rank with the model and the number of steps done; see `vlm2vec.monitor`.

    Raises:
        UserError: for invalid input, or if the output folder already contains a run and `resume` is off.
    """
    output = recipe.output
    is_first = os.environ.get("RANK", "0") == "0"  # only this rank checks for the folder and creates it
    if is_first and not resume:
        check_new(output)
    last = last_checkpoint(output) if resume else None
    changes = check_resume(last, recipe) if last else []
    _warn_of(changes if is_first else [], f"{output}: resuming with other settings")
    if unused := idle_gpus():
        logger.warning(
            "%d of %d GPUs are unused; to use all, run torchrun --nproc-per-node %d -m vlm2vec.cli train RECIPE",
            unused,
            unused + 1,
            unused + 1,
        )
    sets = read_sets(recipe)
    check_negatives(recipe, sets)
    check_scores(recipe, sets)
    build, trainer_class = TASKS[recipe.task]
    embedder = build(recipe)
    join_ranks(embedder.device)
    sets = check_images(embedder, sets, recipe.data.on_bad_image, recipe.data.check_images == "decode")
    _warn_of(changed_pairs(last, sets) if last and is_first else [], f"{output}: resuming with other data")
    if is_first:
        (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        (output / CHECKPOINTS / "recipe.yaml").write_text(dump_recipe(recipe))
    references = open_references(recipe, sets)
    with progress_bar("training", recipe.train.steps) as advance:
        done = 0

        def on_step(step: int) -> None:
            nonlocal done
            advance(step - done)
            done = step
            if monitor is not None:
                monitor(embedder, step)

        trainer = trainer_class(embedder, recipe, sets, output / CHECKPOINTS, on_step, references)
        if monitor is not None and last is None:
            monitor(embedder, 0)
        result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.average:
        trainer.average.use()
    state = trainer.whole_state()
    if trainer.is_world_process_zero():
        facts = {"seconds": result.metrics["train_runtime"], "pairs": {n: len(e) for n, e in sets.items()}}
        _save_run(embedder.eval(), recipe, trainer.state.log_history, facts, state)
    return output


def _warn_of(changes: list[str], what: str) -> None:
    if changes:
        logger.warning("%s: %s", what, "; ".join(changes))


def last_checkpoint(output: Path) -> Path | None:
    """Returns the newest step checkpoint of a run; None if there is no checkpoint."""
    found = step_checkpoints(output / CHECKPOINTS)
    return found[-1] if found else None


def _save_run(
    embedder: Embedder | PairModel,
    recipe: Recipe,
    log: list[dict[str, Any]],
    facts: dict[str, Any],
    state: dict[str, torch.Tensor] | None,
) -> None:
    output = recipe.output
    with named_errors(output):
        embedder.write_files(output, state=state)
    if isinstance(embedder, Embedder):
        _write_golden(embedder, recipe, state)
    (output / "recipe.yaml").write_text(dump_recipe(recipe))
    write_json(output / "provenance.json", checkpoint.provenance(**facts))
    entries = [entry for entry in log if "loss" in entry]
    write_json(output / LOG_FILE, entries)
    write_report(output / REPORT_FILE, _report_facts(recipe, facts), entries)
    write_card(output)


def _write_golden(embedder: Embedder, recipe: Recipe, state: dict[str, torch.Tensor] | None) -> None:
    # A sharded model cannot run in one process, and the vectors of a quantized base differ from those of the folder.
    if state is not None:
        embedder = Embedder.from_pretrained(recipe.output, dtype=embedder.dtype)
    elif recipe.model.quantize:  # on the CPU, because the whole base may not fit on the GPU
        embedder = Embedder.from_pretrained(recipe.output, dtype=embedder.dtype, device="cpu")
    write_golden(embedder, recipe.output)


def _report_facts(recipe: Recipe, facts: Mapping[str, Any]) -> RunFacts:
    """Builds the content of the report besides the curves."""
    train = recipe.train
    tuning = f"LoRA of rank {recipe.lora.rank}" if recipe.lora else "no LoRA"
    lines = (
        f"Model {recipe.model.base}, {tuning}; {train.steps} steps of {train.batch_size} pairs in "
        f"{facts['seconds']:,.0f} s; finished {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "Training pairs: " + ", ".join(f"{number:,} of {name}" for name, number in facts["pairs"].items()),
    )
    group = recipe.evaluate.best_by if recipe.evaluate else "overall"
    history = read_history(recipe.output)
    scores = {int(entry["step"]): float(entry["groups"][group]) for entry in history if group in entry["groups"]}
    return RunFacts(recipe.output.name, lines, dump_recipe(recipe), train.batch_size, scores, group)


def read_log(run: Path) -> list[dict[str, float]]:
    """Reads loss and learning rate by step from a finished run."""
    log: list[dict[str, float]] = json.loads((run / LOG_FILE).read_text())
    return log
