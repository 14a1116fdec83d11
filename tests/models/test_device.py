"""The device of a process, from its rank, the visible GPUs and the setting."""

from __future__ import annotations

import pytest
import torch

from vlm2vec.distributed.cluster import RayPool
from vlm2vec.errors import UserError
from vlm2vec.models.device import idle_gpus, is_device_broken, process_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """`gpus(n)` makes torch see n GPUs; returns the list of devices that became current."""
    current: list[int] = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def pretend(count: int) -> list[int]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    return pretend


@pytest.mark.parametrize(("rank", "count", "index"), [(None, 8, 0), (0, 8, 0), (3, 8, 3), (1, 2, 1), (3, 1, 0)])
def test_each_process_of_torchrun_has_its_own_gpu(gpus, monkeypatch, rank, count, index) -> None:
    current = gpus(count)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert process_device() == process_device("cuda") == torch.device("cuda", index)
    assert current == [index, index]
    assert process_device("cpu") == torch.device("cpu")


def test_workers_of_a_server_share_the_gpus_in_turn(gpus) -> None:
    gpus(2)
    assert [process_device(number=slot).index for slot in range(4)] == [0, 1, 0, 1]
    assert process_device("cuda:1", 0).index == 1


def test_without_a_gpu_it_is_the_cpu(gpus, monkeypatch) -> None:
    gpus(0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert process_device() == torch.device("cpu")
    with pytest.raises(UserError, match="no GPU is visible"):
        process_device("cuda:0")


def test_a_device_that_is_not_there_is_named(gpus, monkeypatch) -> None:
    gpus(2)
    with pytest.raises(UserError, match="device cuda:2: 2 GPUs are visible"):
        process_device("cuda:2")
    with pytest.raises(UserError, match="device gpu0: unknown"):
        process_device("gpu0")
    for name in ("mps", "meta"):
        with pytest.raises(UserError, match=f"device {name}: this torch cannot compute on it"):
            process_device(name)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"LOCAL_RANK 2.*one process per GPU"):
        process_device()


def test_gpus_that_only_torchrun_would_use_are_counted(gpus, monkeypatch) -> None:
    gpus(8)
    assert idle_gpus() == 7
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert idle_gpus() == 0


@pytest.mark.parametrize(("wanted", "in_cluster", "each"), [(None, 0, 0), (None, 1, 0.25), (None, 8, 1), (0, 8, 0)])
def test_ray_actors_share_the_gpus_of_the_cluster(wanted: float | None, in_cluster: int, each: float) -> None:
    assert RayPool("compact", 4, num_gpus=wanted).gpus_of_each(in_cluster) == each


def test_a_broken_context_is_told_from_errors_that_one_input_causes() -> None:
    broken = [torch.AcceleratorError("CUDA error: an illegal memory access"), RuntimeError("CUBLAS_STATUS_EXEC_FAILED")]
    assert all(is_device_broken(error) for error in broken)
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    inputs = [torch.OutOfMemoryError("CUDA out of memory"), ValueError("too long"), RuntimeError("a shape")]
    assert not any(is_device_broken(error) for error in (raised.value, *inputs))
