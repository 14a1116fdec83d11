"""Chooses the device of this process and the data type of its weights, before anything is loaded."""

from __future__ import annotations

import os

import torch

from vlm2vec.errors import UserError, shown


def local_rank() -> int | None:
    """Returns the local rank set by torchrun; None outside of torchrun."""
    text = os.environ.get("LOCAL_RANK", "")
    return int(text) if text.isdigit() else None


def process_device(wanted: str | torch.device | None = None, number: int | None = None) -> torch.device:
    """Returns the device for this process's model, and makes a GPU torch's current device.

    Args:
        wanted: Device such as "cpu" or "cuda:1". Default: CUDA if a GPU is visible, otherwise the CPU. "cuda" without
            an index means the GPU of this process.
        number: Index of this process among workers, which are assigned to the GPUs round-robin. Default: `LOCAL_RANK`,
            which requires a GPU per process. If only one GPU is visible (the launcher sets `CUDA_VISIBLE_DEVICES` for
            each process), that GPU is used.

    Raises:
        UserError: for a device that is unknown or not visible, or more processes than GPUs.
    """
    device = _parse(wanted)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"device {wanted}: no GPU is visible to torch; choose cpu, or check CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    own = (local_rank() or 0) if number is None else number % count
    index = device.index if device.index is not None else own if count > 1 else 0
    if index >= count:
        source = f"device {wanted}" if device.index is not None else f"LOCAL_RANK {own}"
        raise UserError(
            f"{source}: {count} GPUs are visible (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}); "
            "start at most one process per GPU"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def idle_gpus() -> int:
    """Returns the number of visible GPUs that are unused because this process was started without torchrun."""
    if local_rank() is not None or not torch.cuda.is_available():
        return 0
    return torch.cuda.device_count() - 1


def best_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 if the device supports it natively, otherwise float32: emulation is many times slower."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if device.type == "cpu" and native else torch.float32


def floating_type(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Returns the type that is meant: a type of torch, its name, or for None and "auto" the best one of the device.

    Raises:
        UserError: for anything else, such as a type of whole numbers.
    """
    if dtype is None or dtype == "auto":
        return best_dtype(device)
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise UserError(f"dtype={shown(dtype)}: expected a floating-point type of torch, such as bfloat16, or auto")
    return named


def _parse(wanted: str | torch.device | None) -> torch.device:
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device {wanted}: unknown; expected a device such as cpu, cuda or cuda:1") from error
    if device.type != "cuda":
        try:
            torch.zeros(1, device=device).tolist()
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises depends on the device
            raise UserError(f"device {wanted}: this torch cannot compute on it; choose cpu or cuda") from error
    return device


def is_device_broken(error: BaseException) -> bool:
    """Returns whether the device is unusable for the rest of this process, as after an illegal memory access."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    signs = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error")
    return isinstance(error, torch.AcceleratorError) or any(sign in str(error) for sign in signs)
