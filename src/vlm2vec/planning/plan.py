"""Plans a job on given GPUs: its cost, whether it fits, and which settings to change if not, cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from vlm2vec.errors import UserError
from vlm2vec.planning.cost import (
    GIB,
    WEIGHT_BYTES,
    Inputs,
    Memory,
    Training,
    encoding_memory,
    forward_flops,
    lengths,
    parameters,
    step_flops,
    training_memory,
)
from vlm2vec.planning.geometry import Geometry

UTILIZATION = 0.4
"""Assumed fraction of the peak FLOP/s; not measured."""
LEAST_CHUNK, MOST_CHUNK = 512, 32768
ENCODE_TOKENS = 32768


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: Name for reports.
        memory_gib: Memory available to a process, slightly below the nominal size.
        tflops: Dense bfloat16 peak in TFLOP/s, from the manufacturer's data sheet.
    """

    name: str
    memory_gib: float
    tflops: float


GPUS = {
    "h100": Gpu("H100 80 GB", 79.1, 989),
    "a100": Gpu("A100 80 GB", 79.1, 312),
    "l40s": Gpu("L40S 48 GB", 44.4, 362),
    "4090": Gpu("RTX 4090 24 GB", 23.5, 165),
}


def gpu_of(text: str) -> Gpu:
    """Returns a GPU by name or from "GiB,TFLOP/s".

    Raises:
        UserError: for any other text.
    """
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        memory, tflops = (float(part) for part in text.split(","))
        if memory > 0 and tflops > 0:
            return Gpu(f"GPU with {memory:g} GiB", memory, tflops)
    except ValueError:
        pass
    raise UserError(f"--gpu {text}: unknown; expected {', '.join(GPUS)}, or GiB,TFLOP/s such as 79,989")


@dataclass(frozen=True)
class Change:
    """A change that saves memory.

    Attributes:
        setting: Override of a recipe.
        memory_gib: Peak memory with this change and the previous ones.
        hours: Time of the run with this change and the previous ones.
    """

    setting: str
    memory_gib: float
    hours: float


@dataclass(frozen=True)
class Plan:
    """Cost of a job.

    Attributes:
        model: The model's sizes.
        gpu: The type of GPU.
        count: Number of GPUs.
        memory: Peak memory of one GPU, by use.
        flops: FLOPs of the whole job, by component.
        utilization: Assumed fraction of the peak FLOP/s.
        changes: Changes that make the job fit; empty if it already fits or cannot fit.
    """

    model: Geometry
    gpu: Gpu
    count: int
    memory: Memory
    flops: dict[str, float]
    utilization: float
    changes: tuple[Change, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the peak fits the GPU's memory."""
        return self.memory.total <= self.gpu.memory_gib * GIB

    @property
    def hours(self) -> float:
        """Wall-clock time of the whole job with all GPUs, in hours."""
        return _hours(sum(self.flops.values()), self.gpu, self.count, self.utilization)


def _hours(flops: float, gpu: Gpu, count: int, utilization: float) -> float:
    return flops / (gpu.tflops * 1e12 * utilization * count) / 3600


def plan_training(
    model: Geometry,
    training: Training,
    inputs: Inputs,
    gpu: Gpu,
    count: int = 1,
    utilization: float = UTILIZATION,
) -> Plan:
    """Plans a training run with the settings in `training`; `count` GPUs share each batch."""
    step = step_flops(model, training, inputs)
    flops = {
        "vision": float(training.steps * step.vision),
        "language model, forward": float(training.steps * step.language_forward),
        "language model, backward": float(training.steps * step.language_backward),
    }
    memory = training_memory(model, training, inputs, count)
    plan = Plan(model, gpu, count, memory, flops, utilization)
    return plan if plan.fits else replace(plan, changes=_changes(plan, training, inputs))


def plan_encoding(
    model: Geometry, num_inputs: int, inputs: Inputs, gpu: Gpu, count: int = 1, utilization: float = UTILIZATION
) -> Plan:
    """The plan of encoding `num_inputs` inputs, each the size of an average input of a pair."""
    per_input = forward_flops(model, inputs) / len(inputs.texts)
    memory = encoding_memory(model, ENCODE_TOKENS, inputs)
    return Plan(model, gpu, count, memory, {"encoding": num_inputs * per_input}, utilization)


def chunk_tokens_for(
    model: Geometry, training: Training, inputs: Inputs, memory_gib: float, count: int = 1
) -> int | None:
    """Returns the largest mini-batch that fits, in tokens (a power of two); None if the smallest does not fit.

    Args:
        model: The model's sizes.
        training: Settings of the run; its `chunk_tokens` is not used.
        inputs: An average pair.
        memory_gib: Memory of one GPU in GiB.
        count: Number of GPUs.
    """
    tokens = MOST_CHUNK
    while tokens >= LEAST_CHUNK:
        memory = training_memory(model, replace(training, chunk_tokens=tokens), inputs, count)
        if memory.total <= memory_gib * GIB:
            return tokens
        tokens //= 2
    return None


Step = Callable[[Training], tuple[str, Training] | None]


def _changes(plan: Plan, training: Training, inputs: Inputs) -> tuple[Change, ...]:
    """Accumulates changes in order of their cost until the run fits; returns all of them if it never does."""
    found = []
    for setting, changed in _cheaper(plan.model, training, inputs, plan.count):
        memory = training_memory(plan.model, changed, inputs, plan.count).total
        flops = changed.steps * step_flops(plan.model, changed, inputs).total
        found.append(Change(setting, memory / GIB, _hours(flops, plan.gpu, plan.count, plan.utilization)))
        if memory <= plan.gpu.memory_gib * GIB:
            break
    return tuple(found)


def _cheaper(model: Geometry, training: Training, inputs: Inputs, count: int) -> Iterator[tuple[str, Training]]:
    """Yields settings with decreasing memory: first those that also save time, then those that cost no time."""
    now = training
    if now.dora:
        now = replace(now, dora=False)
        yield "lora.dora=false", now
    longest = max(lengths(model, inputs))
    while now.chunk_tokens // 2 >= max(LEAST_CHUNK, longest):
        now = replace(now, chunk_tokens=now.chunk_tokens // 2)
        yield f"train.chunk_tokens={now.chunk_tokens}", now
    if not now.checkpointing:
        now = replace(now, checkpointing=True, chunk_tokens=training.chunk_tokens)
        yield f"model.gradient_checkpointing=true train.chunk_tokens={now.chunk_tokens}", now
        while now.chunk_tokens // 2 >= max(LEAST_CHUNK, longest):
            now = replace(now, chunk_tokens=now.chunk_tokens // 2)
            yield f"train.chunk_tokens={now.chunk_tokens}", now
    if count > 1 and not now.sharded:
        now = replace(now, sharded=True)
        yield "train.sharding=full", now
    if now.rank == 0:
        now = replace(now, rank=8)
        yield "lora.rank=8", now
    for bits, size in WEIGHT_BYTES.items():
        if size < now.weight_bytes and not now.sharded:
            now = replace(now, weight_bytes=size)
            yield f"model.quantize={bits}", now


def report(plan: Plan, assumed: str) -> str:
    """Formats a plan as text.

    Args:
        plan: The plan.
        assumed: Description of the assumed inputs.
    """
    lines = [f"{plan.model.name} on {plan.count} x {plan.gpu.name}; computed, not measured", assumed, ""]
    sizes = parameters(plan.model)
    lines += ["Parameters (millions)"]
    lines += [f"  {name:26}{number / 1e6:10,.0f}" for name, number in {**sizes, "total": sum(sizes.values())}.items()]
    lines += ["Memory of one GPU (GiB)"]
    memory = {**vars(plan.memory), "peak": plan.memory.total, "available": plan.gpu.memory_gib * GIB}
    lines += [f"  {name:26}{number / GIB:10.1f}" for name, number in memory.items()]
    lines += ["FLOPs (PFLOP)"]
    lines += [f"  {name:26}{number / 1e15:10,.1f}" for name, number in plan.flops.items()]
    lines += [
        f"Time: {plan.hours:,.1f} h, {plan.hours * plan.count:,.1f} GPU-hours at {plan.utilization:.0%} of "
        f"{plan.gpu.tflops:g} TFLOP/s",
        verdict(plan),
    ]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """Returns a sentence that says whether the job fits, and the changes to make if not."""
    peak, available = plan.memory.total / GIB, plan.gpu.memory_gib
    if plan.fits:
        return f"It fits: a peak of {peak:.1f} GiB of {available:.1f} GiB."
    text = f"It does not fit: a peak of {peak:.1f} GiB of {available:.1f} GiB."
    for change in plan.changes:
        text += f"\n  {change.setting}: {change.memory_gib:.1f} GiB, {change.hours:,.1f} h"
    if not plan.changes or plan.changes[-1].memory_gib > available:
        text += "\n  No setting suffices; choose a smaller model or a larger GPU."
    return text
