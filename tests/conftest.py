"""Shared fixtures: a cache folder with the test run's own base models, and a small training folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from samples import COLORS, draw, write_train_set

# Tiny models on one thread: on a busy machine, threads that wait for each other take many times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

# How long an example takes depends on what else the machine does; fixtures hold nothing that an example changes.
NO_MATTER = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("any machine", deadline=None, suppress_health_check=NO_MATTER)
settings.load_profile("any machine")


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call() -> Iterator[None]:
    """Deprecated calls made by this package fail; those that other libraries make among themselves do not.

    The filters of pyproject.toml cannot say this: there a module is matched as a whole and not by its package.
    """
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("error", category=category, module=r"vlm2vec\.")
        return (yield)


@pytest.fixture
def train_root(tmp_path: Path) -> Path:
    """Two sets: colours by image (with negatives), and text to image."""
    root = tmp_path / "train"
    cls, ret = [], []
    for i in range(16):
        color = list(COLORS)[i % 4]
        path = f"images/Color/Train/{color}_{i}.png"
        draw(root / path, color, i)
        other = list(COLORS)[(i + 1) % 4]
        ask = "<|image_1|>\nName the colour\n"
        cls.append({"qry": ask, "qry_image_path": path, "pos_text": color, "neg_text": other})
        want = "<|image_1|>\nRepresent the given image.\n"
        ret.append({"qry": f"Find something {color} {i}\n", "pos_text": want, "pos_image_path": path})
    write_train_set(root, "Color", cls)
    write_train_set(root, "Find", ret)
    return root


@pytest.fixture
def recipe_values(train_root: Path, tmp_path: Path) -> dict[str, object]:
    """A recipe for the built-in model at its smallest."""
    return {
        "model": {"base": "compact", "options": {"num_layers": 1, "visual_tokens": 4, "image_size": 64}},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"root": str(train_root)},
        "train": {
            "steps": 6,
            "batch_size": 8,
            "chunk_size": 4,
            "learning_rate": 1e-3,
            "log_steps": 1,
            "save_steps": 3,
            "warmup_steps": 1,
            "bf16": False,  # runs are compared tightly
        },
        "output": str(tmp_path / "run"),
    }
