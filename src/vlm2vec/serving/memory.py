"""Memory of kernels: oneDNN keeps a compiled kernel for each batch shape, and a server meets new shapes constantly."""

from __future__ import annotations

import os

KERNELS = 16
"""Kernels kept by each cache. A kernel of the built-in model takes about 0.4 MiB."""
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # of oneDNN, and of torch's layer above it


def bound_kernel_caches() -> None:
    """Bound the kernel caches of this process, unless the environment sets them. Call it before the first forward pass.

    Each cache holds 1,024 kernels by default, which were hundreds of MiB for texts of mixed lengths.
    """
    for name in CACHES:
        os.environ.setdefault(name, str(KERNELS))
