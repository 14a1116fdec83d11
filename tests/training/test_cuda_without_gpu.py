"""The code's CUDA paths on a CPU: pretended GPUs check devices and count synchronizations. One device and two."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled device guard; compiling takes about 5 s."""
    compiler = shutil.which("c++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler on Linux to build tests/pretend_cuda/guard.cpp")
    library = tmp_path_factory.mktemp("guard") / "pretend.so"
    root = Path(torch.__file__).parent
    include = [f"-I{root / place}" for place in ("include", "include/torch/csrc/api/include")]
    link = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}", "-o", str(library)]
    source = str(HERE / "pretend_cuda/guard.cpp")
    subprocess.run([compiler, "-std=c++20", "-O0", "-shared", "-fPIC", source, *include, *link], check=True)
    return library


def pretended(guard: Path, module: str, *arguments: Path) -> Any:
    """The JSON line that a module of `pretend_cuda` writes."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "src")])
    environment = {**os.environ, "LD_PRELOAD": str(guard), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"pretend_cuda.{module}", *map(str, arguments)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


FAMILIES = ("qwen2_vl", "llava_next", "qwen3_vl")


@pytest.fixture(scope="module")
def of_families(guard: Path, tiny_vlm: Callable[[str], Path]) -> list[dict[str, Any]]:
    """What `pretend_cuda.steps` saw of each family, in one process."""
    return pretended(guard, "steps", *map(tiny_vlm, FAMILIES))


@pytest.fixture(params=range(len(FAMILIES)), ids=FAMILIES)
def found(request: pytest.FixtureRequest, of_families: list[dict[str, Any]]) -> dict[str, Any]:
    """What it saw of one family, by device."""
    return of_families[request.param]


def test_training_resuming_golden_vectors_an_evaluation_and_the_server_run_on_one_of_two_gpus(
    guard: Path, tiny_vlm: Callable[[str], Path], tmp_path: Path
) -> None:
    seen = pretended(guard, "whole", tmp_path, tiny_vlm("qwen2_vl"))
    assert seen["steps"] == [1, 2, 3, 4] and seen["device"] == "cuda:0"
    assert seen["golden"] > 0.999
    assert seen["scored"] == {"tasks": 1, "written": True}
    assert seen["served"] == 2
    assert seen["quantized"] > 0.999


def test_a_step_on_each_of_two_devices_has_the_gradient_of_the_cpu(found: dict[str, Any]) -> None:
    assert list(found) == ["cuda:0", "cuda:1"]
    for seen in found.values():
        assert seen["names"] and seen["loss"] < 1e-6 and seen["gradient"] < 1e-4


def test_encoding_on_each_device_gives_the_vectors_of_the_cpu(found: dict[str, Any]) -> None:
    assert min(seen["cosine"] for seen in found.values()) > 0.9999


def own_places(waits: dict[str, int]) -> dict[str, int]:
    return {place: number for place, number in waits.items() if place.startswith("vlm2vec/")}


def test_no_mini_batch_waits_for_the_device_by_code_of_this_package(found: dict[str, Any]) -> None:
    for seen in found.values():
        few, many = (own_places(seen[name]) for name in ("waits", "waits of many"))
        assert few == many, "mini-batches of one input wait more often than mini-batches of three"
        encoding = own_places(seen["encode waits"])
        assert sum(encoding.values()) <= 1, encoding  # the vectors themselves, once a batch


def test_vision_layers_of_qwen_do_not_wait_for_the_sizes_of_images(of_families: list[dict[str, Any]]) -> None:
    for family, found in zip(FAMILIES, of_families, strict=True):
        for seen in found.values() if family.startswith("qwen") else ():
            waits = {place: number for place, number in seen["waits"].items() if "tolist" in place}
            assert waits == {}


def test_no_mini_batch_waits_to_learn_whether_it_has_padding(found: dict[str, Any]) -> None:
    for seen in found.values():
        places = [place for name in ("waits", "waits of many", "encode waits") for place in seen[name]]
        assert not [place for place in places if "masking_utils" in place]


def test_a_mismatch_and_a_synchronization_are_seen(found: dict[str, Any]) -> None:
    assert "same device" in found["cuda:1"]["mismatch"]
    assert all(seen["seeded"] >= 4 and seen["pageable"] == [1, 0] for seen in found.values())
