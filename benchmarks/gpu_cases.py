"""The cases of benchmarks/gpu.py: functions of `smoke` (tiny, on the CPU) that return measurements by name."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from vlm2vec import Embedder, EmbeddingInput
from vlm2vec.data.collate import collate_pairs
from vlm2vec.data.examples import TrainExample
from vlm2vec.media.images import ImageRef
from vlm2vec.models.backbones.generic import Generic
from vlm2vec.models.backbones.hf_processor import load_processor
from vlm2vec.models.checkpoints.folder import add_adapter
from vlm2vec.models.vision.frozen_vision import FrozenVision
from vlm2vec.planning.cost import GIB, Inputs, Training, step_flops
from vlm2vec.planning.geometry import geometry_of, known_configs
from vlm2vec.planning.plan import GPUS, chunk_tokens_for
from vlm2vec.training import tiny
from vlm2vec.training.config import TrainSettings
from vlm2vec.training.dora import norms_once
from vlm2vec.training.frozen_weights import FrozenCopies
from vlm2vec.training.loss_settings import LossSettings
from vlm2vec.training.objective import Objective
from vlm2vec.training.precision import train_in_float32
from vlm2vec.training.step import ContrastiveStep

SMALL = "Qwen/Qwen2-VL-2B-Instruct"
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165}
Result = dict[str, Any]


def device_of(smoke: bool) -> torch.device:
    """The GPU, or the CPU for a smoke run."""
    if not smoke and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible; --cpu-smoke checks the script on the CPU")
    return torch.device("cpu" if smoke else "cuda")


def finish(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: torch.device, times: int = 3) -> float:
    """Median seconds after one run to warm up."""
    work()
    taken = []
    for _ in range(times):
        finish(device)
        since = time.perf_counter()
        work()
        finish(device)
        taken.append(time.perf_counter() - since)
    return statistics.median(taken)


def random_embedder(name: str, device: torch.device, dtype: torch.dtype, smoke: bool) -> Embedder:
    """A model of published sizes (tiny in a smoke run) with random weights and a tokenizer of single letters."""
    about = known_configs()[name]
    folder = Path(tempfile.mkdtemp())
    config = tiny.BUILDERS[about["model_type"]](folder)
    if not smoke:
        config = published(config, about)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModel.from_config(config, dtype=dtype)
    processor = load_processor(str(folder), {"revision": None, "trust_remote_code": False}, {})
    if not smoke and hasattr(processor.image_processor, "size") and "qwen" in about["model_type"]:
        processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 1003520}
    return Embedder(Generic(model, processor, {}), name).eval()


def published(config: Any, about: dict[str, Any]) -> Any:
    """A tiny model's configuration with the sizes of a published one; token ids stay those of its tokenizer."""
    values = config.to_dict()
    text = values["text_config"] | about["text_config"]
    rotary = text["num_attention_heads"] and text.get("rope_parameters")
    if rotary and "mrope_section" in rotary:
        text["rope_parameters"] = rotary | {"mrope_section": [16, 24, 24]}
    if "head_dim" not in about["text_config"]:
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    text["max_position_embeddings"] = 32768
    text.pop("layer_types", None)  # one entry a layer of the tiny model
    vision = values["vision_config"] | about["vision_config"]
    if about["model_type"] == "qwen2_vl":
        vision |= {"hidden_size": text["hidden_size"], "num_heads": 16}
    elif about["model_type"] == "qwen3_vl":
        vision |= {"out_hidden_size": text["hidden_size"], "num_heads": 16}
    else:
        vision |= {"num_attention_heads": 16, "projection_dim": 768}
        values |= {"image_grid_pinpoints": about["image_grid_pinpoints"], "image_seq_length": 576}
    values |= {"text_config": text, "vision_config": vision}
    values.pop("dtype", None)
    return type(config)(**values)


def pairs_of(count: int, smoke: bool) -> list[TrainExample]:
    """Pairs of one image with 40 letters and 16 letters."""
    size = (60, 50) if smoke else (640, 480)
    made = []
    for i in range(count):
        image = ImageRef.of(Image.new("RGB", size, (i % 256, 255 - i % 256, 90)))
        query = EmbeddingInput("a" * 40, (image,))
        made.append(TrainExample(query, EmbeddingInput("b" * 14 + f"{i:02}"), origin=str(i)))
    return made


def adapted(name: str, device: torch.device, dtype: torch.dtype, smoke: bool, how: str) -> Embedder:
    """A model with adapters, ready to train."""
    embedder = random_embedder(name, device, dtype, smoke)
    with device:
        add_adapter(embedder.backbone, 16, 32, 0.1, None, how == "dora")
    train_in_float32(embedder)
    if how.startswith("checkpointing"):
        embedder.backbone.enable_gradient_checkpointing()
    if how == "compiled":
        for layer in embedder.backbone.language_model.layers:
            layer.compile(backend="eager" if smoke else "inductor")
    return embedder.train()


def training_step(how: str, smoke: bool, name: str = SMALL, tokens: int = 4096, num_pairs: int = 128) -> Result:
    """One step with GradCache: seconds, peak memory, and the share of the GPU's peak FLOP/s."""
    device = device_of(smoke)
    num_pairs = 4 if smoke else num_pairs
    dtype = torch.float32 if how == "float32-copies" else torch.bfloat16
    embedder = adapted(name, device, dtype, smoke, how)
    copies = FrozenCopies(embedder, torch.bfloat16)
    step = ContrastiveStep(
        embedder,
        Objective(LossSettings(), 0.02).to(device),
        TrainSettings(steps=1, chunk_size=None, chunk_tokens=tokens, kept_chunks=1),
        device,
        FrozenVision(embedder.backbone.model),
        partial(torch.autocast, device.type, torch.bfloat16),
        in_half=True,
    )
    batch = collate_pairs(embedder.backbone.process, pairs_of(num_pairs, smoke))

    def work() -> None:
        embedder.zero_grad()
        with copies.in_place(), norms_once(embedder):
            step.backward(batch, embedder.parameters())

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(work, device, 1 if smoke else 2)
    result: Result = {"seconds": round(seconds, 3), "pairs_per_second": round(num_pairs / seconds, 1)}
    if device.type == "cuda":
        training = Training(num_pairs, 1, tokens, 16, 0.1, how == "dora", how == "checkpointing")
        flops = step_flops(geometry_of(name), training, Inputs()).total
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 1)
        result["tflops"] = round(flops / seconds / 1e12, 1)
        peak = next((value for part, value in PEAK_TFLOPS.items() if part in torch.cuda.get_device_name()), None)
        result["utilization"] = round(flops / seconds / 1e12 / peak, 3) if peak else None
    return result


def fits(name: str, smoke: bool) -> Result:
    """A step at the planned mini-batch: whether it fits, and the peak."""
    device = device_of(smoke)
    total = GPUS["h100"].memory_gib if smoke else torch.cuda.mem_get_info(device)[1] / GIB
    training = Training(8, 1, 0, 16, 0.1)
    tokens = chunk_tokens_for(geometry_of(name), training, Inputs(), total)
    how = "bfloat16"
    if tokens is None:
        how, tokens = "checkpointing", 4096
    return {"chunk_tokens": tokens, "how": how, **training_step(how, smoke, name, tokens, 16)}


def bandwidth(smoke: bool) -> Result:
    """Copies and a matrix product."""
    device = device_of(smoke)
    size = 1 << (20 if smoke else 28)
    host, there = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8, device=device)
    result = {"device_copy_gb_s": round(2 * size / seconds_of(there.clone, device) / 1e9, 1)}
    result["to_device_gb_s"] = round(size / seconds_of(lambda: there.copy_(host), device) / 1e9, 1)
    if device.type == "cuda":
        pinned = host.pin_memory()
        copy = partial(there.copy_, pinned, non_blocking=True)
        result["pinned_to_device_gb_s"] = round(size / seconds_of(copy, device) / 1e9, 1)
    width = 256 if smoke else 8192
    a = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    result["matmul_tflops"] = round(2 * width**3 / seconds_of(lambda: a @ a, device) / 1e12, 2)
    return result


def gradients(smoke: bool) -> Result:
    """Compares a tiny model's gradients on the device and on the CPU: largest difference relative to the maximum."""
    device, found = device_of(smoke), []
    for where in (torch.device("cpu"), device):
        torch.manual_seed(0)
        embedder = random_embedder(SMALL, torch.device("cpu"), torch.float32, True)
        add_adapter(embedder.backbone, 4, 8, 0.0, None)
        generator = torch.Generator().manual_seed(1)
        for key, parameter in embedder.named_parameters():
            if "lora_B" in key:
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        embedder = embedder.to(where).train()
        batch = collate_pairs(embedder.backbone.process, pairs_of(6, True))
        settings = TrainSettings(steps=1, chunk_size=3, kept_chunks=1)
        step = ContrastiveStep(embedder, Objective(LossSettings(), 0.1).to(where), settings, where, None, nullcontext)
        step.backward(batch, embedder.parameters())
        found.append({key: p.grad.cpu() for key, p in embedder.named_parameters() if p.grad is not None})
    worst = max(float((found[1][k] - g).abs().max() / g.abs().max().clamp(min=1e-12)) for k, g in found[0].items())
    return {"largest_relative_difference": worst, "parameters": len(found[0])}


def profile(smoke: bool) -> Result:
    """Profiles the encoding of a batch: fraction of idle time, synchronizations, slowest kernels."""
    device = device_of(smoke)
    embedder = random_embedder(SMALL, device, torch.bfloat16, smoke)
    batch = embedder.backbone.process([pair.query for pair in pairs_of(2 if smoke else 16, smoke)]).to(device)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.inference_mode():
        embedder(batch)
        finish(device)
        since = time.perf_counter()
        with torch.profiler.profile(activities=kinds) as seen:
            embedder(batch)
            finish(device)
        wall = time.perf_counter() - since
    events = seen.key_averages()
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    busy = sum(getattr(event, field) for event in events) / 1e6
    waits = sum(event.count for event in events if event.key in ("cudaStreamSynchronize", "cudaMemcpyAsync"))
    top = sorted(events, key=lambda event: -getattr(event, field))[:5]
    return {
        "idle_share": round(max(0.0, 1 - busy / wall), 3),
        "waits": waits,
        "top": [event.key[:60] for event in top],
    }


def encode(threads: int, smoke: bool) -> Result:
    """Encodes 512 images and 128 images with text from JPEG files, prepared by `threads` threads."""
    embedder = random_embedder(SMALL, device_of(smoke), torch.bfloat16, smoke)
    folder = Path(tempfile.mkdtemp())
    items: list[Any] = []
    for i in range(6 if smoke else 640):
        data = io.BytesIO()
        Image.effect_noise((60, 50) if smoke else (640, 480), 40 + i % 50).convert("RGB").save(data, "JPEG")
        (folder / f"{i}.jpg").write_bytes(data.getvalue())
        items.append(folder / f"{i}.jpg" if i % 5 else {"text": f"what is {i}", "image": folder / f"{i}.jpg"})
    embedder.encode(items[:4], workers=threads)
    since = time.perf_counter()
    embedder.encode(items, workers=threads)
    return {"inputs_per_second": round(len(items) / (time.perf_counter() - since), 1)}


def latency(smoke: bool) -> Result:
    """Measures a single text query in milliseconds, from the string to the vector."""
    embedder = random_embedder(SMALL, device_of(smoke), torch.bfloat16, smoke)
    taken = []
    for i in range(3 if smoke else 30):
        since = time.perf_counter()
        embedder.encode([f"a query of some words {i}"])
        taken.append(1000 * (time.perf_counter() - since))
    return {"median_ms": round(statistics.median(taken[1:]), 1), "most_ms": round(max(taken[1:]), 1)}


def precision(smoke: bool) -> Result:
    """Returns the lowest cosine between vectors in bfloat16 and in float32 with the same weights."""
    device = device_of(smoke)
    embedder = random_embedder(SMALL, device, torch.bfloat16, smoke)
    items = [f"text number {i} " * (1 + i % 4) for i in range(8)]
    half = embedder.encode(items)
    cosines = (half * embedder.float().encode(items)).sum(axis=1)
    return {"least_cosine": round(float(cosines.min()), 6)}


WAYS = ("float32-copies", "dora", "bfloat16", "checkpointing", "compiled")
CASES: dict[str, Callable[[bool], Result]] = {
    "bandwidth": bandwidth,
    "gradients": gradients,
    **{f"step-{how}": partial(training_step, how) for how in WAYS},
    **{f"tokens-{tokens}": partial(training_step, "bfloat16", tokens=tokens) for tokens in (2048, 8192, 16384)},
    "fits-qwen2-vl-7b": partial(fits, "Qwen/Qwen2-VL-7B-Instruct"),
    "fits-llava-1.6-7b": partial(fits, "llava-hf/llava-v1.6-mistral-7b-hf"),
    "profile": profile,
    **{f"encode-{threads}": partial(encode, threads) for threads in (1, 4, 16)},
    "latency": latency,
    "precision": precision,
}
