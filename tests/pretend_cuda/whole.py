"""Whole commands on a pretended GPU: `python -m pretend_cuda.whole FOLDER MODEL` writes a JSON line. Preload the guard.

Training with checkpoints, resuming, golden vectors, an evaluation, and the server's engine.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  # before torch is changed
import peft
import safetensors.torch
import torch
from samples import draw, write_train_set
from torch.utils._pytree import tree_map

from pretend_cuda import cuda
from pretend_cuda.steps import plain
from vlm2vec import Embedder, EmbeddingInput
from vlm2vec.evaluation.run import score_model
from vlm2vec.models.encoding.pipeline import Pipeline
from vlm2vec.models.verification.golden import verify_golden
from vlm2vec.serving.engine import Engine
from vlm2vec.serving.settings import ServeSettings
from vlm2vec.training.config import Recipe
from vlm2vec.training.run import build_embedder, read_log, train


def load_on_cpu_then_move() -> None:
    """Loads models with the real torch: reading weights is transformers' own code."""
    original: Any = Embedder.from_pretrained.__func__  # type: ignore[attr-defined]

    def load(cls: Any, source: Any, device: Any = None, **options: Any) -> Embedder:
        mine, torch.tensor = torch.tensor, cuda._tensor
        try:
            with torch.utils._python_dispatch._disable_current_modes():
                made = original(cls, source, device="cpu", **options)
        finally:
            torch.tensor = mine
        moved: Embedder = made.to(device or "cuda")
        return moved

    Embedder.from_pretrained = classmethod(load)  # type: ignore[assignment, method-assign]


def save_plain() -> None:
    """safetensors and pickle read memory directly, as they do of real CUDA tensors."""
    peft.peft_model.id_tensor_storage = lambda tensor: (str(tensor.device), id(tensor), tensor.nbytes)
    write, pickled = safetensors.torch.save_file, torch.save

    def save_file(tensors: Any, *args: Any, **options: Any) -> None:
        write({name: plain(tensor).contiguous() for name, tensor in tensors.items()}, *args, **options)

    for module in list(sys.modules.values()):
        for name in ("save_file", "safe_save_file"):
            if getattr(module, name, None) is write:
                setattr(module, name, save_file)
    torch.save = lambda value, *args, **options: pickled(  # type: ignore[assignment]
        tree_map(lambda x: plain(x) if isinstance(x, torch.Tensor) else x, value), *args, **options
    )


def recipe(base: str, folder: Path, steps: int) -> Recipe:
    train_settings = {"steps": steps, "batch_size": 8, "chunk_size": 3, "log_steps": 1, "save_steps": 2}
    return Recipe.model_validate(
        {
            "model": {"base": base},
            "lora": {"rank": 4, "dropout": 0.0},
            "data": {"root": folder / "train", "batching": "mixed"},
            "train": {**train_settings, "report_to": [], "learning_rate": 1e-3, "ema_decay": 0.9},
            "output": folder / "run",
        }
    )


class Silent:
    """An observer that ignores everything."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def serve_pretended() -> None:
    """The mode belongs to a thread, and wrapper tensors do not support inference mode."""
    loop = Engine._forward_loop

    def forward_loop(self: Engine) -> None:
        with cuda.PretendMode():
            loop(self)

    Engine._forward_loop = forward_loop  # type: ignore[method-assign]
    Engine._vectors = torch.no_grad()(Engine._vectors.__wrapped__)  # type: ignore[method-assign, attr-defined]


async def served(embedder: Embedder) -> int:
    engine = Engine(embedder, ServeSettings(model="m", threads=1, image_cache_bytes=0), Silent())  # type: ignore[arg-type]
    engine.start()
    try:
        answers = await engine.embed([EmbeddingInput("a"), EmbeddingInput("b longer")])
    finally:
        engine.close()
    return sum(hasattr(answer, "vector") for answer in answers)


def scored(run: Path, folder: Path) -> dict[str, Any]:
    """An evaluation of two queries; its scores and the number of inputs that were encoded."""
    lines = [{"query": f"word {i}", "candidates": [f"answer {i}", "something else"]} for i in range(2)]
    (folder / "Beach.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "mine.yaml").write_text("{name: mine, source: {eval: .}, tasks: {Beach: {reader: records}}}")
    _, results = score_model(str(run), folder / "mine.yaml", folder / "scores", cache=folder / "cache")
    return {"tasks": len(results), "written": (folder / "scores/results.json").is_file()}


def quantized(base: str, folder: Path) -> float:
    """The lowest cosine of vectors over a 4-bit base on the GPU to those on the CPU."""
    settings = recipe(base, folder, 1)
    settings.model.quantize = "nf4"
    with torch.no_grad():
        embedder = build_embedder(settings).eval()
        batch = embedder.backbone.process([EmbeddingInput("a"), EmbeddingInput("b longer")])
        on_gpu = plain(embedder(batch.to(embedder.device))).float()
        assert embedder.device.type == "cuda"
    on_cpu = embedder.to("cpu")(batch).float()
    return float(torch.cosine_similarity(on_gpu, plain(on_cpu)).min())


def main(folder: str, base: str) -> None:
    place = Path(folder)
    found: dict[str, Any] = {}
    Pipeline._vectors = torch.no_grad()(Pipeline._vectors.__wrapped__)  # type: ignore[method-assign, attr-defined]
    rows = [{"qry": f"word {i}", "pos_text": f"answer {i}"} for i in range(6)]
    for i in range(6):
        draw(place / f"train/images/{i}.png", "red", i)
        rows.append({"qry": "<|image_1|>\nWhat?\n", "qry_image_path": f"images/{i}.png", "pos_text": f"thing {i}"})
    write_train_set(place / "train", "Mixed", rows)
    load_on_cpu_then_move()
    save_plain()
    serve_pretended()
    cuda.activate(2)  # without torchrun one GPU trains and the other stays idle
    with cuda.PretendMode():
        train(recipe(base, place, 2))
        run = train(recipe(base, place, 4), resume=True)
        found["steps"] = [entry["step"] for entry in read_log(run)]
        embedder = Embedder.from_pretrained(str(run), dtype=torch.bfloat16)
        found["device"] = str(embedder.device)
        found["golden"] = float(verify_golden(embedder, run).min())
        found["scored"] = scored(run, place)
        found["served"] = asyncio.run(served(embedder))
        found["quantized"] = quantized(base, place)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
