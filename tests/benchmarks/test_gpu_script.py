"""Runs benchmarks/gpu.py on the CPU with tiny models, and checks the sizes of its GPU models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vlm2vec.planning.cost import parameters
from vlm2vec.planning.geometry import geometry_of, known_configs
from vlm2vec.training import tiny

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def cases() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    import gpu_cases

    yield gpu_cases
    sys.path.remove(str(FOLDER))


@pytest.mark.filterwarnings("ignore")
def test_every_case_runs_and_gives_numbers(cases: Any) -> None:
    for name, case in cases.CASES.items():
        assert any(isinstance(value, int | float) for value in case(True).values()), name


def test_the_script_writes_each_result(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(FOLDER / "gpu.py"), "--output", str(output)]
    ran = subprocess.run([*command, "--cpu-smoke", "--only", "bandwidth"], capture_output=True, text=True, check=True)
    assert json.loads(output.read_text()) == json.loads(ran.stdout.splitlines()[-1])
    assert json.loads(output.read_text())["bandwidth"]["matmul_tflops"] > 0


def test_a_case_that_fails_is_a_result(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    def failed(command: list[str], **options: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nRuntimeError: CUDA error")

    monkeypatch.setattr(subprocess, "run", failed)
    assert gpu.run_case("bandwidth", False, 5.0)["error"] == "RuntimeError: CUDA error"
    with pytest.raises(SystemExit, match="no GPU is visible"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        cases.device_of(False)


@pytest.mark.parametrize("name", [name for name in known_configs() if "Phi" not in name])
def test_models_for_a_gpu_have_the_published_number_of_parameters(cases: Any, name: str, tmp_path: Path) -> None:
    about = known_configs()[name]
    config = cases.published(tiny.BUILDERS[about["model_type"]](tmp_path), about)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(
        sum(parameters(geometry_of(name)).values()), rel=0.01
    )
