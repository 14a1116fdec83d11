"""Evaluation during training: scores a benchmark every N steps on all ranks and keeps the best checkpoint."""

from __future__ import annotations

import shutil
from typing import Any

from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import load_benchmark
from vlm2vec.evaluation.evaluate import check_tasks, evaluate, groups_of, results_json
from vlm2vec.evaluation.processes import joined_processes
from vlm2vec.evaluation.tasks import TaskReader
from vlm2vec.files import write_json
from vlm2vec.models.embedder import Embedder
from vlm2vec.retrieval.embedding_cache import EmbeddingCache
from vlm2vec.training.config import Recipe
from vlm2vec.training.output import HISTORY_FILE, read_history
from vlm2vec.types import EvalQuery

BEST_FOLDER = "best"


class Monitor:
    """Scores a model during training; pass it to `training.run.train`.

    Every rank encodes its share of the inputs into a cache beside the checkpoints, which is removed afterwards. Rank 0
    scores, appends to `evaluations.json`, and writes `best/` when the chosen mean exceeds all earlier ones. The monitor
    draws no random numbers, so the weights equal those of a run without it.

    Args:
        recipe: A recipe with `evaluate`.

    Raises:
        UserError: for a missing benchmark, task or image, before training starts.
    """

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.evaluate is not None, "a recipe without `evaluate` needs no monitor"
        self.settings = recipe.evaluate
        self.output, self.last_step = recipe.output, recipe.train.steps
        benchmark, folder = load_benchmark(self.settings.benchmark, self.settings.data)
        self.benchmark = benchmark.to_score(self.settings.tasks)
        groups = {"overall", *(group for mine in groups_of(self.benchmark.tasks).values() for group in mine)}
        if self.settings.best_by not in groups:
            known = ", ".join(sorted(groups))
            raise UserError(f"evaluate.best_by: {self.settings.best_by} is not a group of these tasks; groups: {known}")
        reader = TaskReader(self.benchmark, folder)
        check_tasks(reader)
        self.tasks: dict[str, list[EvalQuery]] = {
            name: queries[: self.settings.num_queries] for name, queries in reader.items()
        }

    def __call__(self, embedder: Embedder, step: int) -> None:
        """Scores the model if the step is one to evaluate at; step 0 is before the first one."""
        wanted = step % self.settings.every_steps == 0 or step == self.last_step
        if not (wanted if step else self.settings.at_start):
            return
        folder = self.output / "checkpoints" / "vectors"
        with joined_processes() as share:
            cache = EmbeddingCache(folder, {"model": "training", "step": str(step)})
            results = evaluate(embedder, self.benchmark, self.tasks, cache=cache, share=share)
            if share.rank == 0:
                self._record(embedder, step, results_json(f"step {step}", self.benchmark, results))
                shutil.rmtree(folder, ignore_errors=True)
            share.wait()

    def _record(self, embedder: Embedder, step: int, content: dict[str, Any]) -> None:
        groups = content["groups"]
        file = self.output / HISTORY_FILE
        # A resumed run repeats the steps after its checkpoint.
        history = [entry for entry in read_history(self.output) if entry["step"] < step]
        scores = {name: task["score"] for name, task in content["tasks"].items()}
        best = max((entry["groups"][self.settings.best_by] for entry in history), default=-1.0)
        write_json(file, [*history, {"step": step, "groups": groups, "tasks": scores}])
        if groups[self.settings.best_by] > best:
            embedder.save_pretrained(self.output / BEST_FOLDER, [("evaluation.json", content)])
