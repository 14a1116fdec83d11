"""Puts trained weights into the package in float16, with their SHA-256 and golden vectors; prints the checksum.

    python -m pretraining.ship trained.safetensors

Without a file, the weights of the package stay as they are, and golden vectors are computed again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from vlm2vec.models.backbones.compact import weights
from vlm2vec.models.backbones.compact.model import Compact
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.verification.golden import write_golden


def ship(trained: Path) -> str:
    """Writes the weights that `pretraining.teach_sentence` trained, and what verifies them; returns the SHA-256."""
    digest = weights.write_pretrained(load_file(trained), weights.SHIPPED)
    write_golden(Embedder.from_pretrained(Compact.name, dtype=torch.float32, device="cpu"), weights.SHIPPED.parent)
    return digest


if __name__ == "__main__":
    print(ship(Path(sys.argv[1] if len(sys.argv) > 1 else weights.SHIPPED)))
