"""What `vlm2vec doctor` reports: versions, devices, data type, attention kernels, caches, optional parts."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlm2vec import __version__
from vlm2vec.cache import cache_folder
from vlm2vec.extras import extras, installed_version
from vlm2vec.models.backbones.compact.install import COMMAND, missing_parts
from vlm2vec.models.device import best_dtype

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "pillow", "numpy")
GIB = 2**30
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at.
        value: What was found.
        install: The command that installs what is missing; empty if nothing is.
    """

    name: str
    value: str
    install: str = ""


def findings() -> list[Finding]:
    """Every line of the report: this machine, then the optional parts."""
    return [*_machine(), *_parts()]


def memory_gib(device: torch.device) -> float:
    """Memory of a GPU, or of this machine (of this container, if it has a limit)."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory) / GIB
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return min(total, int(limit) if limit.isdigit() else total) / GIB


def _machine() -> Iterator[Finding]:
    yield Finding("vlm2vec", f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    yield Finding("libraries", ", ".join(f"{name} {installed_version(name) or 'missing'}" for name in LIBRARIES))
    cpu = torch.device("cpu")
    yield Finding("CPU", f"{len(os.sched_getaffinity(0))} cores, {memory_gib(cpu):.1f} GiB memory")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        about = torch.cuda.get_device_properties(index)
        text = f"{about.name}, {about.total_memory / GIB:.1f} GiB, compute capability {about.major}.{about.minor}"
        yield Finding(f"GPU {index}", f"{text}, CUDA {torch.version.cuda}")
    if not count:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield Finding("GPU", f"none visible to torch, which is {build}")
    device = torch.device("cuda", 0) if count else cpu
    yield Finding("default dtype", f"{str(best_dtype(device)).removeprefix('torch.')} on {device.type}")
    yield Finding("attention", _attention(device))
    folder = cache_folder()
    yield Finding("cache", f"{folder}, {_size_gb(folder):.2f} GB (vlm2vec cache ls)")
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    offline = "offline, because HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0") != "0" else "online"
    yield Finding("model hub", f"{offline}; {hub}, {_size_gb(hub):.2f} GB")


def _attention(device: torch.device) -> str:
    """Kernels that `scaled_dot_product_attention` may choose, and whether flash-attn is there, too."""
    flash = installed_version("flash-attn")
    if device.type != "cuda":
        return "PyTorch's CPU kernels"
    backends: Any = torch.backends.cuda  # its functions have no types
    names = {"flash": "flash", "mem_efficient": "memory-efficient", "cudnn": "cuDNN", "math": "math"}
    enabled = {name: getattr(backends, f"{key}_sdp_enabled")() for key, name in names.items()}
    kernels = ", ".join(name for name, is_on in enabled.items() if is_on)
    return f"PyTorch's {kernels}; flash-attn {flash or 'not installed (not required)'}"


def _parts() -> Iterator[Finding]:
    missing = missing_parts()
    yield Finding(
        "built-in model", f"missing: {', '.join(missing)}" if missing else "ready", COMMAND if missing else ""
    )
    found = extras()
    if not found:
        yield Finding("extras", "unknown: vlm2vec runs from its source, without package metadata", "pip install -e .")
    for extra in found:
        text = f"missing: {', '.join(extra.missing)}" if extra.missing else "installed"
        yield Finding(f"extra {extra.name}", text, extra.command if extra.missing else "")


def _size_gb(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
