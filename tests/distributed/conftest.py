"""One Ray cluster of two workers for the whole session; only slow tests start it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from tiny.fixtures import tiny_vlm  # noqa: F401


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Start two workers on this machine, with a small object store."""
    ray.init(num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tiny_vlm) -> str:  # noqa: F811
    return str(tiny_vlm("llava"))
