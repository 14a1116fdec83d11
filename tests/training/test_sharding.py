"""Two ranks compared with one process, with DDP and FSDP2; each loads the checkpoints of the others."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from samples import draw, write_train_set
from torch import multiprocessing
from torch.distributed.tensor import DTensor

from vlm2vec import Embedder, EmbeddingInput
from vlm2vec.data.collate import collate_pairs
from vlm2vec.data.examples import TrainExample
from vlm2vec.media.images import ImageRef
from vlm2vec.models.verification.golden import verify_golden
from vlm2vec.training import sharding
from vlm2vec.training.config import Recipe, TrainSettings
from vlm2vec.training.loss_settings import LossSettings
from vlm2vec.training.objective import Objective
from vlm2vec.training.run import build_embedder, read_log, read_sets, train
from vlm2vec.training.step import ContrastiveStep
from vlm2vec.training.trainer import ContrastiveTrainer

KINDS: dict[str, dict[str, Any]] = {
    "full": {"lora": None},
    "lora": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0}, "loss": {"learn_temperature": True}},
    "bfloat16": {"lora": None},
}

CASES = [("ddp", "full"), ("sharded", "full"), ("sharded", "lora")]
IN_HALF = ("sharded", "bfloat16")


class Catching(ContrastiveTrainer):
    """Keeps the gradients of its first step, whole."""

    caught: dict[str, torch.Tensor] | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        value = super().training_step(*args, **kwargs)
        assert self.is_sharded == any(isinstance(p, DTensor) for p in self.embedder.parameters())
        if self.caught is None:
            named = self.embedder.named_parameters()
            self.caught = {name: sharding.whole(p.grad).clone() for name, p in named if p.grad is not None}
        return value


def recipe(base: str, root: Path, output: Path, kind: str, layout: str) -> Recipe:
    values = {
        "model": {"base": base},
        "data": {"root": root, "batching": "mixed"},
        "train": {"steps": 4, "batch_size": 8, "chunk_size": 3, "learning_rate": 1e-3, "log_steps": 1}
        | {"save_steps": 2, "bf16": kind == "bfloat16", "sharding": "full" if layout == "sharded" else "none"},
        "output": output,
    }
    return Recipe.model_validate(values | KINDS[kind])


def gradients(settings: Recipe) -> dict[str, torch.Tensor]:
    trainer = Catching(build_embedder(settings), settings, read_sets(settings), settings.output / "gradients")
    trainer.args.max_steps = 1
    trainer.train()
    assert trainer.caught is not None
    if trainer.is_sharded:  # the complete model is held once, not by every rank
        assert bool(trainer.whole_state()) == (os.environ["RANK"] == "0")
    return trainer.caught


def one_of_two(rank: int, port: int, base: str, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    place = Path(folder)
    for layout, kind in [*CASES, IN_HALF]:
        found = gradients(recipe(base, place / "data", place / f"{layout}-{kind}-g", kind, layout))
        if rank == 0:
            torch.save(found, place / f"{layout}-{kind}.pt")
    torch.save(step_of(base, UNEVEN[4 * rank :][:4]), place / f"uneven-{rank}.pt")
    train(recipe(base, place / "data", place / "sharded", "lora", "sharded"))
    train(recipe(base, place / "data", place / "alone-then-sharded", "lora", "sharded"), resume=True)
    train(recipe(base, place / "data", place / "ddp", "lora", "ddp"))
    if rank == 0:
        half_of(place / "ddp", place / "ddp-then-sharded")
    torch.distributed.barrier()
    train(recipe(base, place / "data", place / "ddp-then-sharded", "lora", "sharded"), resume=True)
    torch.distributed.destroy_process_group()


def text(words: str) -> EmbeddingInput:
    return EmbeddingInput(words)


def image(i: int) -> EmbeddingInput:
    return EmbeddingInput("look " * (20 + i), (ImageRef.of(Image.new("RGB", (60, 50 + 9 * i), (60 * i, 90, 9))),))


UNEVEN = [TrainExample(image(i), text(f"answer {'so ' * 20}{i}"), (text(f"no {i}"),)) for i in range(4)]
UNEVEN += [TrainExample(text(f"q{i}"), text(f"a{i % 3}")) for i in range(4)]
"""Pairs of two ranks: the first four have most of the tokens."""


def step_of(base: str, examples: list[TrainExample]) -> dict[str, Any]:
    """One step: loss, gradients, and the tokens that this rank encoded in the second of its passes."""
    torch.manual_seed(0)
    embedder = Embedder.from_pretrained(base, dtype=torch.float32, device="cpu").train()
    batch = collate_pairs(embedder.backbone.process, examples)
    tokens = []

    def model(part: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            tokens.append(sum(part.lengths()))
        return embedder(part)

    settings = TrainSettings(steps=1, chunk_size=3, kept_chunks=0)
    step = ContrastiveStep(model, Objective(LossSettings(directions="both"), 0.1), settings, torch.device("cpu"))
    result = step.backward(batch, embedder.parameters())
    named = {name: p.grad for name, p in embedder.named_parameters() if p.grad is not None}
    return {"loss": result.loss, "gradients": named, "tokens": sum(tokens), "read": sum(batch.inputs.lengths())}


def half_of(run: Path, output: Path) -> None:
    """A run that was cut after its second step."""
    shutil.copytree(run / "checkpoints" / "checkpoint-2", output / "checkpoints" / "checkpoint-2")


@pytest.fixture(scope="module")
def runs(tiny_qwen2_vl: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients and runs of one process and of two, in their folders; half of the inputs have no image."""
    folder = tmp_path_factory.mktemp("layouts")
    rows = [{"qry": f"find {'very ' * (i % 5)}{i}", "pos_text": f"words {i}"} for i in range(8)]
    for i in range(8):
        draw(folder / f"data/images/{i}.png", ("red", "green", "blue", "yellow")[i % 4], i)
        image = {"qry": "<|image_1|>\nWhat is it?\n", "qry_image_path": f"images/{i}.png"}
        rows.append({**image, "pos_text": f"thing {i % 3}"})
    write_train_set(folder / "data", "Mixed", rows)
    torch.save(step_of(tiny_qwen2_vl, UNEVEN), folder / "uneven-alone.pt")
    for kind in KINDS:
        settings = recipe(tiny_qwen2_vl, folder / "data", folder / f"alone-{kind}-g", kind, "alone")
        torch.save(gradients(settings), folder / f"alone-{kind}.pt")
    train(recipe(tiny_qwen2_vl, folder / "data", folder / "alone", "lora", "alone"))
    half_of(folder / "alone", folder / "alone-then-sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(one_of_two, (port, tiny_qwen2_vl, str(folder)), nprocs=2)
    half_of(folder / "sharded", folder / "sharded-then-alone")
    train(recipe(tiny_qwen2_vl, folder / "data", folder / "sharded-then-alone", "lora", "alone"), resume=True)
    return folder


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_two_processes_have_the_gradient_of_one(runs: Path, layout: str, kind: str) -> None:
    alone, pair = (torch.load(runs / f"{name}-{kind}.pt") for name in ("alone", layout))
    assert alone.keys() == pair.keys() and len(alone) > 20
    if kind == "lora":
        assert alone["objective.log_temperature"] != 0
    for name, gradient in pair.items():
        largest = float(alone[name].abs().max())
        torch.testing.assert_close(
            gradient, alone[name], rtol=1e-4, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_layers_gathered_in_bfloat16_have_the_gradient_of_one_process_within_rounding(runs: Path) -> None:
    layout, kind = IN_HALF
    alone, pair = (torch.load(runs / f"{name}-{kind}.pt") for name in ("alone", layout))
    assert alone.keys() == pair.keys()
    assert all(gradient.dtype is torch.float32 for gradient in pair.values())
    one, other = (torch.cat([found[name].flatten() for name in sorted(alone)]) for found in (alone, pair))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.99


def test_two_unbalanced_ranks_encode_equal_shares_and_have_the_loss_and_gradient_of_one_process(runs: Path) -> None:
    alone, *ranks = (torch.load(runs / f"uneven-{which}.pt") for which in ("alone", 0, 1))
    assert ranks[0]["read"] > 3 * ranks[1]["read"]
    assert max(found["tokens"] for found in ranks) < 1.1 * sum(found["read"] for found in ranks) / 2
    for found in ranks:
        torch.testing.assert_close(found["loss"], alone["loss"])
        for name, gradient in alone["gradients"].items():
            atol = 1e-5 * float(gradient.abs().max())
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("way", ["ddp", "sharded", "alone-then-sharded", "sharded-then-alone", "ddp-then-sharded"])
def test_a_run_is_the_same_in_any_layout_and_goes_on_in_another(runs: Path, way: str) -> None:
    whole, other = (read_log(runs / name) for name in ("alone", way))
    for number in ("loss", "grad_norm"):
        assert [entry[number] for entry in other] == pytest.approx([entry[number] for entry in whole], rel=1e-4)
    assert verify_golden(Embedder.from_pretrained(runs / way, dtype=torch.float32), runs / way).min() > 0.99999
    vectors = [load_file(runs / name / "golden.safetensors")["embeddings"] for name in ("alone", way)]
    torch.testing.assert_close(vectors[1], vectors[0], rtol=0, atol=1e-3)


def test_sharded_runs_say_what_they_cannot_do(tmp_path: Path) -> None:
    values = recipe("x", tmp_path, tmp_path, "lora", "sharded").model_dump()
    with pytest.raises(ValueError, match="does not support a moving average"):
        Recipe.model_validate(values | {"train": {**values["train"], "ema_decay": 0.9}})
    with pytest.raises(ValueError, match="does not support evaluation during training"):
        Recipe.model_validate(values | {"evaluate": {"benchmark": "mmeb-v1"}})
