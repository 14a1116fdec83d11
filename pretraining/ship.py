"""Copies a finished adapter into the package in float16, with reference embeddings, and prints its checksum.

python -m pretraining.ship runs/compact-embed src/vlm2vec/models/backbones/compact/compact_embed
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlm2vec.models.checkpoints.adapters import WEIGHTS_FILE
from vlm2vec.models.checkpoints.folder import EMBEDDER_FILE
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.verification.golden import write_golden


def ship(run: Path, folder: Path) -> str:
    """Copies the files needed for loading, with float16 weights; returns the SHA-256 of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (EMBEDDER_FILE, "adapter_config.json"):
        shutil.copyfile(run / name, folder / name)
    halves = {name: value.half().contiguous() for name, value in load_file(run / WEIGHTS_FILE).items()}
    save_file(halves, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_golden(Embedder.from_pretrained(folder, dtype=torch.float32), folder)
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


if __name__ == "__main__":
    print(ship(Path(sys.argv[1]), Path(sys.argv[2])))
