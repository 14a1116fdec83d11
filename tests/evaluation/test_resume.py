"""Evaluations that are killed, repeated and shared between real processes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("resumed.py")
NUM_INPUTS = 60 + 10 + 10


def run(toy_file: Path, store: Path, output: Path, kill_at: int = 0, processes: int = 1):
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launch, str(SCRIPT), str(toy_file), str(store), str(output), str(kill_at)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def uninterrupted(toy_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("whole")
    done = run(toy_file, folder / "store", folder / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"encoded {NUM_INPUTS}\n"
    return folder / "store", (folder / "out/results.json").read_text()


def test_killed_twice_in_the_middle_it_ends_with_the_same_results(
    toy_file: Path, uninterrupted: tuple[Path, str], tmp_path: Path
) -> None:
    store, output = tmp_path / "store", tmp_path / "out"
    for kill_at in (3, 5):
        assert run(toy_file, store, output, kill_at).returncode == -signal.SIGKILL
        assert not output.exists()
    done = run(toy_file, store, output)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"encoded {NUM_INPUTS - 8 * (2 + 4)}\n"
    assert (output / "results.json").read_text() == uninterrupted[1]


def test_a_second_run_encodes_nothing_and_gives_the_same_results(
    toy_file: Path, uninterrupted: tuple[Path, str], tmp_path: Path
) -> None:
    done = run(toy_file, uninterrupted[0], tmp_path)
    assert done.stdout == "encoded 0\n"
    assert (tmp_path / "results.json").read_text() == uninterrupted[1]


def test_two_processes_of_torchrun_share_the_work_and_give_the_same_results(
    toy_file: Path, uninterrupted: tuple[Path, str], tmp_path: Path
) -> None:
    done = run(toy_file, tmp_path / "store", tmp_path / "out", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = [int(count) for count in re.findall(r"encoded (\d+)", done.stdout)]
    assert len(parts) == 2 and sum(parts) == NUM_INPUTS and min(parts) >= 24
    assert (tmp_path / "out/results.json").read_text() == uninterrupted[1]
    assert 0 < json.loads(uninterrupted[1])["groups"]["overall"] < 1
