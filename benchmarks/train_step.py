"""Measures a contrastive training step (loss of the whole batch, all gradients, optimizer) against other systems, in
pairs per second on the same model and the same pairs of uneven length. Each system runs in its own process, so that its
peak memory is measured separately.

    python benchmarks/train_step.py [--pairs 12] [--steps 1] [--only qwen2-vl-lora] [--bf16]

Times are CPU time with one thread, which equals wall-clock time on an idle machine and changes little on a busy one.

Systems, all in float32 (with --bf16, under autocast) and with gradient caching:
    ours        chunks of rows sorted by length with a token budget; one forward pass of the frozen vision encoder;
                patch embedding as a matrix product; last layer at the last token only. In bfloat16, frozen weights are
                cast once and short rows use plain attention
    sentence_transformers  its CachedMultipleNegativesRankingLoss on modules around the same network
    reference   the published VLM2Vec recipe: queries and targets padded to full length, then split into chunks; vision
                encoder in both passes
Models: a Qwen2-VL with the proportions of the 2B model at a quarter of its width (random weights), and `compact`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from vlm2vec import Embedder, EmbeddingInput
from vlm2vec.batch import Batch
from vlm2vec.data.collate import collate_pairs
from vlm2vec.data.examples import TrainExample
from vlm2vec.losses import info_nce
from vlm2vec.media.images import ImageRef
from vlm2vec.models.checkpoints.folder import add_adapter
from vlm2vec.models.pooling import last_token
from vlm2vec.models.vision.frozen_vision import FrozenVision
from vlm2vec.models.vision.patch_embed import KINDS
from vlm2vec.training.config import TrainSettings
from vlm2vec.training.frozen_weights import FrozenCopies
from vlm2vec.training.loss_settings import LossSettings
from vlm2vec.training.objective import Objective
from vlm2vec.training.step import ContrastiveStep

CASES = ("qwen2-vl-lora", "qwen2-vl-full", "compact-lora", "compact-full")
SYSTEMS = ("ours", "sentence_transformers", "reference")
CHUNK, CHUNK_TOKENS, TEMPERATURE = 8, 512, 0.02
LETTERS = "abcdefghij klmnop qrstu vwxyz "
SPECIAL = ["<pad>", "<end>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def write_qwen2_vl(folder: Path) -> None:
    """Writes a folder in the layout of a real checkpoint; every token is a letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *letters])}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(SPECIAL)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", eos_token="<end>", model_input_names=["input_ids", "attention_mask"]
    ).save_pretrained(folder)
    transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=336 * 336).save_pretrained(folder)
    ids = {token: i for i, token in enumerate(SPECIAL)}
    config = transformers.Qwen2VLConfig(
        text_config={
            "hidden_size": 384,
            "intermediate_size": 2240,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "vocab_size": len(SPECIAL) + len(letters),
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
        },
        vision_config={"depth": 8, "embed_dim": 256, "hidden_size": 384, "num_heads": 4, "mlp_ratio": 4},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)


def make_pairs(count: int) -> list[TrainExample]:
    """Creates pairs of uneven length: a third each caption to image, image and question to answer, text to text."""
    rng = random.Random(0)
    shapes = np.random.default_rng(0)
    pairs = []
    for i in range(count):
        size = (rng.randrange(56, 337), rng.randrange(56, 337))
        coarse = Image.fromarray(shapes.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        image = ImageRef.of(coarse.resize(size, Image.Resampling.BICUBIC))
        words = "".join(rng.choices(LETTERS, k=int(rng.lognormvariate(3.5, 0.8)) + 4))
        seen = "<|vision_start|><|image_1|><|vision_end|>"
        kinds = [
            (EmbeddingInput(f"Find: {words}"), EmbeddingInput(f"{seen}Represent it.", (image,))),
            (EmbeddingInput(f"{seen}{words}?", (image,)), EmbeddingInput(words[:12])),
            (EmbeddingInput(words), EmbeddingInput(words[::-1] * 2)),
        ]
        pairs.append(TrainExample(*kinds[i % 3], origin=f"pair {i}"))
    return pairs


def build(case: str, folder: Path, plain_convolutions: bool) -> Embedder:
    """Builds the model with adapters, with the same weights in every process."""
    torch.manual_seed(0)
    source = str(folder) if case.startswith("qwen2-vl") else "compact"
    embedder = Embedder.from_pretrained(source, dtype=torch.float32, device="cpu")
    if plain_convolutions:
        back = {product: plain for plain, product in KINDS.items()}
        for module in embedder.modules():
            module.__class__ = back.get(type(module), type(module))
    if case.endswith("lora"):
        add_adapter(embedder.backbone, rank=8, alpha=16, dropout=0.0, targets=None)
        for name, parameter in sorted(embedder.named_parameters()):
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return embedder.train()


def autocast(half: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=half)


def ours(embedder: Embedder, pairs: list[TrainExample], half: bool) -> Callable[[], float]:
    model = embedder.backbone.model
    vision = FrozenVision(model) if FrozenVision.possible(model) else None
    settings = TrainSettings(steps=1, chunk_size=None, chunk_tokens=CHUNK_TOKENS)
    objective = Objective(LossSettings(mask_equal_queries=False), TEMPERATURE, mask_equal_targets=False)
    frozen = FrozenCopies(embedder, torch.bfloat16 if half else torch.float32)
    around = partial(autocast, half)
    contrastive = ContrastiveStep(embedder, objective, settings, torch.device("cpu"), vision, around, in_half=half)
    batch = prepared(embedder, lambda: collate_pairs(embedder.backbone.process, pairs))

    def step() -> float:
        with frozen.in_place():
            return float(contrastive.backward(batch()).loss)

    return step


def reference(embedder: Embedder, pairs: list[TrainExample], half: bool) -> Callable[[], float]:
    """The reference step, written from the description of the published code: no trimming, no sorting, no caching."""

    def process() -> list[Batch]:
        return [embedder.backbone.process([getattr(pair, side) for pair in pairs]) for side in ("query", "target")]

    batches = prepared(embedder, process)

    def step() -> float:
        parts = [[untrimmed(side, i) for i in range(0, len(pairs), CHUNK)] for side in batches()]
        with torch.no_grad(), autocast(half):
            leaves = [[all_tokens(embedder, part) for part in side] for side in parts]
        for leaf in (leaf for side in leaves for leaf in side):
            leaf.requires_grad_()
        value = info_nce(torch.cat(leaves[0]), torch.cat(leaves[1]), torch.arange(len(pairs)), TEMPERATURE)
        value.backward()
        for side, found in zip(parts, leaves, strict=True):
            for part, leaf in zip(side, found, strict=True):
                with autocast(half):
                    vectors = all_tokens(embedder, part)
                vectors.backward(leaf.grad)
        return float(value.detach())

    return step


def all_tokens(embedder: Embedder, batch: Batch) -> torch.Tensor:
    """Runs every token through every layer; returns the state of the last token."""
    hidden_BLD = embedder.backbone.hidden_states(batch)
    return nn.functional.normalize(last_token(hidden_BLD, batch["attention_mask"]).float(), dim=-1)


def untrimmed(batch: Batch, start: int) -> Batch:
    """Returns a chunk padded to the width of the whole batch."""
    part = batch.slice(start, min(start + CHUNK, len(batch)))
    wide = {name: tensor[start : start + CHUNK] for name, tensor in batch.tensors.items() if name not in batch.rows}
    return Batch({**part.tensors, **wide}, part.rows, batch.padded)


def sentence_transformers(embedder: Embedder, pairs: list[TrainExample], half: bool) -> Callable[[], float]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses, modules

    backbone = embedder.backbone
    network = ByHand(embedder)
    pooling = modules.Pooling(embedder.embedding_dim, "lasttoken")
    model = SentenceTransformer(modules=[network, pooling, modules.Normalize()], device="cpu")
    model.train()
    loss = losses.CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=CHUNK)
    sides = [[getattr(pair, side) for pair in pairs] for side in ("query", "target")]
    features = prepared(embedder, lambda: [network.features(backbone.process(side)) for side in sides])

    def step() -> float:
        with autocast(half):  # as its trainer does
            value = loss([dict(side) for side in features()], torch.arange(len(pairs)))
        value.backward()
        return float(value.detach())

    return step


class ByHand(nn.Module):
    """First module of a SentenceTransformer around the same network. Its own class cannot load Qwen2-VL models without
    torchvision. Features have the names of its own preprocessing."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.backbone = embedder.backbone

    def features(self, batch: Batch) -> dict[str, Any]:
        features: dict[str, Any] = {**batch.tensors, "modality": "message"}
        if "image_features" in features:
            features["pixel_values"] = features.pop("image_features")
            features["num_images_per_sample"] = batch.rows["image_features"]
        elif "image_grid_thw" in features:
            features["num_images_per_sample"] = batch.rows["image_grid_thw"]
        return features

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        tensors = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
        counts = tensors.pop("num_images_per_sample", None)
        rows = {} if counts is None else dict.fromkeys(("pixel_values", "image_grid_thw"), counts)
        if "image_grid_thw" not in tensors and "pixel_values" in tensors:  # compact's images are features already
            tensors["image_features"], rows = tensors.pop("pixel_values"), {"image_features": counts}
        features["token_embeddings"] = self.backbone.hidden_states(Batch(tensors, rows))
        return features


def prepared(embedder: Embedder, make: Callable[[], Any]) -> Callable[[], Any]:
    """Prepares the inputs outside of the measured time: all systems do the same work, in workers during the step."""
    batch = make()
    return lambda: batch


def measure(case: str, system: str, folder: Path, num_pairs: int, num_steps: int, half: bool) -> dict[str, Any]:
    """Measures a system in this process: seconds per step, peak memory, and the values that must agree."""
    embedder = build(case, folder, plain_convolutions=system != "ours")
    pairs = make_pairs(num_pairs)
    step = {"ours": ours, "sentence_transformers": sentence_transformers, "reference": reference}[system](
        embedder, pairs, half
    )
    trained = [parameter for parameter in embedder.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, losses, norms = [], [], []
    for _ in range(num_steps + 1):
        since = time.process_time()
        losses.append(step())
        norms.append(float(nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])))
        optimiser.step()
        optimiser.zero_grad()
        times.append(time.process_time() - since)
    return {
        "seconds": min(times[1:]),
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rss_before_mib": before / 1024,
        "losses": losses,
        "norms": norms,
        "parameters": sum(p.numel() for p in embedder.parameters()),
    }


def in_a_process(arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def agree(found: dict[str, dict[str, Any]]) -> float:
    """Returns the largest relative difference of any loss or gradient norm to ours."""
    worst = 0.0
    for name in ("losses", "norms"):
        for other in found.values():
            mine = np.array(found["ours"][name])
            worst = max(worst, float(np.abs((np.array(other[name]) - mine) / mine).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument(
        "--bf16", action="store_true", help="train under autocast to bfloat16; results agree up to rounding"
    )
    parser.add_argument("--child", nargs=3, metavar=("CASE", "SYSTEM", "FOLDER"), help=argparse.SUPPRESS)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    if settings.child:
        case, system, folder = settings.child
        print(json.dumps(measure(case, system, Path(folder), settings.pairs, settings.steps, settings.bf16)))
        return
    transformers.logging.disable_progress_bar()
    ratios: dict[str, float] = {}
    dtype = "bfloat16" if settings.bf16 else "float32"
    print(f"{settings.pairs} pairs per step, best of {settings.steps}, 1 thread, {dtype}", flush=True)
    print(f"{'case':<16}{'system':<24}{'pairs/s':>9}{'peak MiB':>10}{'of it the step':>16}")
    with tempfile.TemporaryDirectory() as name:
        write_qwen2_vl(Path(name))
        for case in [settings.only] if settings.only else CASES:
            common = ["--pairs", str(settings.pairs), "--steps", str(settings.steps), *["--bf16"] * settings.bf16]
            found = {system: in_a_process([*common, "--child", case, system, name]) for system in SYSTEMS}
            for system, row in found.items():
                grown = row["rss_mib"] - row["rss_before_mib"]
                speed = settings.pairs / row["seconds"]
                print(f"{case:<16}{system:<24}{speed:>9.2f}{row['rss_mib']:>10.0f}{grown:>16.0f}", flush=True)
            size = found["ours"]["parameters"] / 1e6
            print(f"{case:<16}{size:.1f} M parameters, losses and gradients differ by at most {agree(found):.1e}")
            for system in SYSTEMS[1:]:
                place = f"{system}_{case}".replace("-", "_")
                ratios[f"x_{place}"] = round(found[system]["seconds"] / found["ours"]["seconds"], 2)
                ratios[f"rss_x_{place}"] = round(found[system]["rss_mib"] / found["ours"]["rss_mib"], 2)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
