"""The command `plan`: computes the cost of a job in advance."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from vlm2vec.errors import UserError
from vlm2vec.progress import say

if TYPE_CHECKING:
    from vlm2vec.training.config import Recipe


def plan(
    recipe: Annotated[str, typer.Argument(help="A YAML recipe or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, such as train.chunk_tokens=4096.")] = None,
    gpu: Annotated[str, typer.Option(help="h100, a100, l40s, 4090, or GiB,TFLOP/s such as 79,989.")] = "h100",
    count: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the peak FLOP/s that the job is assumed to reach.")
    ] = 0.4,
    image: Annotated[
        str | None, typer.Option(help="Size of an average image in pixels.  [default: that of the data, else 640x480]")
    ] = None,
    encode: Annotated[
        int | None, typer.Option(min=1, help="Plan encoding this many inputs instead of training.")
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option("--eval", help="Plan an evaluation on this benchmark instead of training.")
    ] = None,
) -> None:
    """Compute parameters, memory, FLOPs and time of a recipe from its model's configuration; offline.

    Tokens per pair come from a sample of the recipe's data folder; without one, an average pair is assumed.

    Example: vlm2vec plan vlm2vec-v2-qwen2vl --gpu 4090
    """
    from vlm2vec.planning.geometry import geometry_of
    from vlm2vec.planning.plan import LEAST_CHUNK, chunk_tokens_for, gpu_of, plan_encoding, plan_training, report
    from vlm2vec.training.chunks import training_of
    from vlm2vec.training.config import load_recipe
    from vlm2vec.training.recipes import find_recipe
    from vlm2vec.training.sample import sample_inputs

    settings = load_recipe(find_recipe(recipe), overrides or [])
    model = geometry_of(settings.model.base, settings.model.options)
    inputs, about = sample_inputs(settings)
    if image:
        inputs, about = replace(inputs, size=size_of(image)), f"{about}; with --image {image}"
    if encode or evaluate:
        num_inputs = encode or num_inputs_of(str(evaluate))
        made = plan_encoding(model, num_inputs, inputs, gpu_of(gpu), count, utilization)
        about += f"; {num_inputs:,} inputs"
    else:
        wanted = gpu_of(gpu)
        training = training_of(settings)
        if settings.train.chunk_tokens == "auto":
            tokens = chunk_tokens_for(model, training, inputs, wanted.memory_gib, count)
            training = training_of(settings, tokens or LEAST_CHUNK)
        made = plan_training(model, training, inputs, gpu_of(gpu), count, utilization)
        about += f"; mini-batches of {training.chunk_tokens} tokens"
    say(report(made, about))


def size_of(image: str) -> tuple[int, int]:
    """Width and height from WIDTHxHEIGHT.

    Raises:
        UserError: for any other text.
    """
    width, _, height = image.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise UserError(f"--image {image}: expected WIDTHxHEIGHT, such as 640x480")
    return int(width), int(height)


def num_inputs_of(benchmark: str) -> int:
    """Queries and candidates of a benchmark's tasks, equal candidates of different queries counted once."""
    from vlm2vec.evaluation.benchmark import read_benchmark

    return sum((task.num_queries or 0) + (task.num_candidates or 0) for task in read_benchmark(benchmark)[0].tasks)


def verdict_for(recipe: Recipe) -> tuple[str, bool] | None:
    """Returns the plan's verdict for this machine's GPU, printed by `train` before loading, and whether to start.

    Returns None without a GPU and for models that the planner does not support.
    """
    import os

    import torch

    from vlm2vec.planning.cost import GIB
    from vlm2vec.planning.geometry import geometry_of
    from vlm2vec.planning.plan import Gpu, plan_training, verdict
    from vlm2vec.training.chunks import chunk_tokens_of, training_of
    from vlm2vec.training.sample import sample_inputs

    if not torch.cuda.is_available():
        return None
    try:
        model = geometry_of(recipe.model.base, recipe.model.options)
    except UserError:
        return None
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    gpu = Gpu(torch.cuda.get_device_name(0), memory, 1.0)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    chunk = chunk_tokens_of(recipe, torch.device("cuda", 0))
    made = plan_training(model, training_of(recipe, chunk or 8192), sample_inputs(recipe)[0], gpu, count)
    # The closed forms are accurate to about 15 %, so a run is rejected only if it exceeds the memory by more than that.
    return verdict(made), made.memory.total <= 1.15 * memory * GIB
