"""Host memory that a frozen weight costs in LoRA training on a CPU in bfloat16.

    python benchmarks/frozen_memory.py [--layers 4 12] [--steps 3]

Writes two Qwen2-VL models with random bfloat16 weights that differ in the number of decoder layers, trains each with
`vlm2vec train` in a process of its own, and divides the difference of the peaks (resident memory) by the difference of
the numbers of frozen weights. Two bytes are the floor. A mini-batch holds a single word, so that activations of the
additional layers hardly count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import transformers
import yaml

from vlm2vec.training.tiny import write_tiny

WIDTH, INNER, HEADS = 1024, 4096, 16


def write_model(folder: Path, layers: int) -> int:
    """Writes the model; returns the number of its weights."""
    import torch

    write_tiny("qwen2_vl", folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = WIDTH, INNER, layers
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = HEADS, 2, WIDTH // HEADS
    text.layer_types, text.rope_parameters["mrope_section"] = ["full_attention"] * layers, [8, 12, 12]
    config.vision_config.hidden_size = WIDTH
    model = transformers.Qwen2VLModel(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def write_recipe(folder: Path, steps: int) -> Path:
    """Writes eight pairs of words and a recipe."""
    (folder / "data").mkdir()
    rows = [{"query": f"word {i}", "target": f"answer {i}"} for i in range(8)]
    (folder / "data/words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"base": str(folder / "model")},
        "lora": {"rank": 1, "alpha": 1},
        "data": {"root": str(folder / "data")},
        "train": {"steps": steps, "batch_size": 2, "chunk_size": 1, "bf16": True, "report_to": []},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def peak_bytes(recipe: Path) -> int:
    """Peak resident memory of `vlm2vec train`, on Linux.

    The kernel's record of the process is read while it runs: that of `wait4` also counts this process before the exec.
    """
    command = [sys.executable, "-m", "vlm2vec.cli", "train", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    record, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        lines = record.read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))])
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"training failed with exit code {process.returncode}")
    return peak * 1024


def measure(layers: int, steps: int) -> tuple[int, int]:
    """Weights of a model and the peak of its training."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        return write_model(folder / "model", layers), peak_bytes(write_recipe(folder, steps))


def main() -> None:
    """Prints the two peaks and the bytes of a weight as a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs=2, type=int, default=[4, 12])
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    (few, low), (many, high) = (measure(layers, arguments.steps) for layers in sorted(arguments.layers))
    found = {"weights": [few, many], "peak_mib": [low >> 20, high >> 20]}
    sys.stdout.write(json.dumps({**found, "bytes_per_weight": round((high - low) / (many - few), 2)}) + "\n")


if __name__ == "__main__":
    main()
