"""Generates the tables of docs/guides/gpus.md with the planner: known models on three machines, memory by setting."""

from __future__ import annotations

from dataclasses import replace

from vlm2vec.planning.cost import GIB, WEIGHT_BYTES, Inputs, Training, lengths, training_memory
from vlm2vec.planning.geometry import Geometry, geometry_of, known_configs
from vlm2vec.planning.plan import GPUS, Gpu, chunk_tokens_for, plan_training

MACHINES = ((GPUS["4090"], 1), (GPUS["h100"], 1), (GPUS["h100"], 8))
TRAINING = Training(pairs=1024, steps=1, chunk_tokens=0, rank=16, dropout=0.1)
SMALL = 2048
"""Mini-batches with fewer tokens leave a GPU idle; activation checkpointing is chosen instead."""


def sizing_table() -> str:
    """Returns a Markdown table with settings that fit, their peak memory, and the time of a step of 1,024 pairs."""
    head = ["model", *(f"{count} x {gpu.name}" for gpu, count in MACHINES)]
    rows = [head, ["---"] * len(head)]
    for name in known_configs():
        model = geometry_of(name)
        rows.append([name, *(_cell(model, gpu, count) for gpu, count in MACHINES)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def memory_table() -> str:
    """Returns a Markdown table of the GiB of one GPU for a mini-batch of 8,192 tokens (4,096 if marked)."""
    head = ["model", "weights", "activations, LoRA / with DoRA", "peak, LoRA / with DoRA", "peak, 4,096 tokens"]
    head += ["peak, checkpointing", "and nf4 weights"]
    rows = [head, ["---", *["--:"] * (len(head) - 1)]]
    plain = replace(TRAINING, chunk_tokens=8192)
    dora, small, again = (
        replace(plain, **changes) for changes in ({"dora": True}, {"chunk_tokens": 4096}, {"checkpointing": True})
    )
    for name in known_configs():
        model = geometry_of(name)
        memory = [
            training_memory(model, training, Inputs())
            for training in (plain, dora, small, again, replace(again, weight_bytes=WEIGHT_BYTES["nf4"]))
        ]
        activations = [part.activations / GIB for part in memory]
        peaks = [part.total / GIB for part in memory]
        both = [f"{one:.1f} / {other:.1f}" for one, other in (activations[:2], peaks[:2])]
        rows.append([name, f"{memory[0].weights / GIB:.1f}", *both, *(f"{peak:.1f}" for peak in peaks[2:])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _cell(model: Geometry, gpu: Gpu, count: int) -> str:
    inputs = Inputs()
    for checkpointing in (False, True):
        training = replace(TRAINING, checkpointing=checkpointing)
        tokens = chunk_tokens_for(model, training, inputs, gpu.memory_gib, count)
        if tokens and tokens >= max(SMALL, *lengths(model, inputs)):
            plan = plan_training(model, replace(training, chunk_tokens=tokens), inputs, gpu, count)
            how = f"{tokens:,} tokens" + (", checkpointing" if checkpointing else "")
            return f"{how}: {plan.memory.total / 2**30:.0f} GiB, {_seconds(plan.hours * 3600)}"
    return "does not fit"


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s"
