"""Tiny LLaVA checkpoints shared by several test modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlm2vec import Embedder
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.verification.export import export


@pytest.fixture(scope="session")
def adapter(tiny_vlm, tmp_path_factory) -> Path:
    """A LoRA checkpoint of a tiny LLaVA whose adapter matters."""
    tuned = Embedder.from_pretrained(tiny_vlm("llava"), dtype=torch.float32, device="cpu")
    checkpoint.add_adapter(tuned.backbone, 2, 4, 0.0, None)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in tuned.backbone.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("export") / "adapter"
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def merged(adapter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "out"
    export(str(adapter), "merged", folder)
    return folder
