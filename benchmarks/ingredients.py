"""Measures what each ingredient of a recipe adds to a training step: CPU time of the step with it over the plain step.

    python benchmarks/ingredients.py [--pairs 6] [--rounds 3]

A step is the loss of the whole batch, all gradients and AdamW, on the Qwen2-VL of random weights and the pairs of
train_step.py, with LoRA of rank 8. Rounds are interleaved, and the best time of each variant counts. Guide and teacher
are present as vectors, since they encode each input once, before the first step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn
from train_step import CHUNK_TOKENS, TEMPERATURE, build, make_pairs, write_qwen2_vl

from vlm2vec import Embedder, EmbeddingInput
from vlm2vec.data.collate import PairBatch, collate_pairs
from vlm2vec.data.examples import TrainExample
from vlm2vec.models.vision.frozen_vision import FrozenVision
from vlm2vec.training.config import TrainSettings
from vlm2vec.training.loss_settings import LossSettings
from vlm2vec.training.objective import Objective
from vlm2vec.training.step import ContrastiveStep

DIM = 384
Pairs = list[TrainExample]
Variant = tuple[str, LossSettings, Callable[[Pairs], Pairs], tuple[str, str]]


def plain(pairs: Pairs) -> Pairs:
    return pairs


def with_instruction(pairs: Pairs) -> Pairs:
    return [pair.with_target_instruction("Represent:") for pair in pairs]


def with_second_target(pairs: Pairs) -> Pairs:
    return [dataclasses.replace(pair, more_targets=(text_of(i),)) for i, pair in enumerate(pairs)]


def with_negative(pairs: Pairs) -> Pairs:
    return [dataclasses.replace(pair, negatives=(text_of(i),), scores=(2.0, 0.5)) for i, pair in enumerate(pairs)]


def text_of(number: int) -> EmbeddingInput:
    """A text of about 40 tokens, different for each pair."""
    return EmbeddingInput(f"a further text for pair number {number} of it")


CAUSAL, LAST = "causal", "last"
VARIANTS: dict[str, Variant] = {
    "plain": ("", LossSettings(), plain, (CAUSAL, LAST)),
    "loss.hardness_alpha: 9": ("", LossSettings(hardness_alpha=9), plain, (CAUSAL, LAST)),
    "loss.directions: both": ("", LossSettings(directions="both"), plain, (CAUSAL, LAST)),
    "target_instruction, 10 tokens": ("", LossSettings(), with_instruction, (CAUSAL, LAST)),
    "a second target": ("", LossSettings(kind="supcon"), with_second_target, (CAUSAL, LAST)),
    "a hard negative": ("", LossSettings(), with_negative, (CAUSAL, LAST)),
    "a hard negative, soft_labels": ("", LossSettings(also={"soft_labels": 0.5}), with_negative, (CAUSAL, LAST)),
    "loss.guide": ("guide", LossSettings(guide="guide"), plain, (CAUSAL, LAST)),
    "loss.teacher": (
        "teacher", LossSettings(teacher="teacher", also={"distillation": 1.0}), plain, (CAUSAL, LAST),
    ),
    "model.pooling: mean": ("", LossSettings(), plain, (CAUSAL, "mean")),
    "model.attention: bidirectional, mean": ("", LossSettings(), plain, ("bidirectional", "mean")),
}  # fmt: skip
"""By name: the field of the batch that holds another model's vectors, the loss, the pairs, attention and pooling."""


def prepared(embedder: Embedder, variant: Variant, pairs: Pairs) -> PairBatch:
    """The batch of a variant, with random vectors in place of those of a guide or teacher."""
    field, _, change, _ = variant
    batch = collate_pairs(embedder.backbone.process, change(pairs))
    if field:
        vectors = nn.functional.normalize(torch.randn(len(batch.inputs), DIM), dim=-1)
        batch = dataclasses.replace(batch, **{field: vectors})
    return batch


def seconds(embedder: Embedder, variant: Variant, batch: PairBatch) -> float:
    """CPU time of a step; the weights stay as they are, since the learning rate is 0."""
    _, loss, _, (attention, pooling) = variant
    backbone = embedder.backbone
    backbone.attention, backbone.pooling = attention, pooling
    settings = TrainSettings(steps=1, chunk_size=None, chunk_tokens=CHUNK_TOKENS)
    step = ContrastiveStep(
        embedder, Objective(loss, TEMPERATURE), settings, torch.device("cpu"), FrozenVision(backbone.model)
    )
    optimizer = torch.optim.AdamW([p for p in embedder.parameters() if p.requires_grad], lr=0.0)
    since = time.process_time()
    step.backward(batch)
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - since


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        write_qwen2_vl(Path(name))
        embedder = build("qwen2-vl-lora", Path(name), plain_convolutions=False)
    pairs = make_pairs(settings.pairs)
    batches = {name: prepared(embedder, variant, pairs) for name, variant in VARIANTS.items()}
    seconds(embedder, VARIANTS["plain"], batches["plain"])
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(settings.rounds):
        for name, variant in VARIANTS.items():
            times[name].append(seconds(embedder, variant, batches[name]))
    base, tokens = min(times["plain"]), int(sum(batches["plain"].inputs.lengths()))
    print(f"{settings.pairs} pairs of {tokens} tokens in all, best of {settings.rounds}, 1 thread, float32")
    ratios = {}
    for name, found in times.items():
        ratios[name] = round(min(found) / base, 2)
        spread = (max(found) - min(found)) / base
        more = int(sum(batches[name].inputs.lengths())) - tokens
        print(f"{name:<40}{min(found):>8.2f} s{ratios[name]:>7.2f}{more:>+8} tokens, spread {spread:.2f}", flush=True)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
