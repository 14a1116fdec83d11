"""Tensors that say they are on CUDA and compute on the CPU. They check devices as CUDA does and count what waits.

Use in a process of its own with the library of `guard.cpp` preloaded: `activate` changes torch for good.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
HERE = Path(__file__).name
SYNCHRONIZATIONS: Counter[tuple[str, str]] = Counter()
"""(operation, file:line of the caller) -> how often the host would have waited for the device."""
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
    aten.is_nonzero.default,
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
current = [0]
PINNED: dict[int, torch.Tensor] = {}
"""Pinned tensors by the address of their storage; they are held, so that no address is used again."""


def device_of(device: Any) -> torch.device:
    """A device with its index; that of "cuda" is the current one."""
    found = torch.device(device)
    index = current[0] if found.index is None else found.index
    return torch.device("cuda", index) if found.type == "cuda" else found


def pin(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    """As `Tensor.pin_memory`."""
    if is_pinned(tensor):
        return tensor
    made = tensor.clone()
    PINNED[made.untyped_storage().data_ptr()] = made
    return made


def is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
    """As `Tensor.is_pinned`. A copy from a view with gaps goes through pageable memory."""
    return tensor.is_contiguous() and tensor.untyped_storage().data_ptr() in PINNED


def waits(what: str) -> None:
    """Counts a synchronization under the innermost line outside of torch and of this file."""
    for frame in reversed(traceback.extract_stack()):
        if HERE not in frame.filename and "/torch/" not in frame.filename:
            place = frame.filename.split("site-packages/")[-1].split("/src/")[-1]
            SYNCHRONIZATIONS[what, f"{place}:{frame.lineno}"] += 1
            return


class Pretend(torch.Tensor):
    """A CPU tensor `elem` that says it is on a CUDA device."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor, device: torch.device) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            requires_grad=False,
            device=device,
        )
        made.elem = elem
        return made

    def __init__(self, elem: torch.Tensor, device: torch.device) -> None:
        pass

    def __repr__(self) -> str:
        return f"Pretend({self.elem}, {self.device})"

    @property
    def data(self) -> Any:
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        torch.Tensor.data.__set__(self, value)
        self.elem = value.elem

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def tolist(self) -> Any:
        waits("tolist")
        return self.elem.tolist()

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Checks devices, counts synchronizations, computes on the CPU and wraps the result."""
    flat, spec = tree_flatten((args, kwargs))
    mine = [value for value in flat if isinstance(value, Pretend)]
    _check_devices(func, args, flat, mine)
    _count(func, args, kwargs, mine)
    name, target = str(func), kwargs.get("device")
    if name.startswith("aten._fused_sdp_choice"):
        return 0
    where = device_of(target) if target is not None else mine[0].device if mine else torch.device("cpu")
    plain_args, plain = tree_unflatten([v.elem if isinstance(v, Pretend) else v for v in flat], spec)
    plain = {key: value for key, value in plain.items() if key != "pin_memory"}
    if target is not None and torch.device(target).type == "cuda":
        plain["device"] = torch.device("cpu")
    output = func(*plain_args, **plain)
    if func is aten._local_scalar_dense.default:
        return output
    same = {id(value.elem): value for value in mine}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, Pretend):
            return value
        return same.get(id(value)) if id(value) in same else Pretend(value, where) if where.type == "cuda" else value

    return tree_map(wrap, output)


def _check_devices(func: Any, args: Any, flat: list[Any], mine: list[Pretend]) -> None:
    if not mine or func is aten.copy_.default or str(func).startswith(("aten._to_copy", "aten.copy")):
        return
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    if func in INDEXING:  # indices on the CPU are copied; indices on another device than the CPU tensor fail
        indices = [value for value in tree_flatten(args[1])[0] if isinstance(value, torch.Tensor)]
        if not isinstance(args[0], Pretend) and any(isinstance(index, Pretend) for index in indices):
            raise RuntimeError(f"indices should be either on cpu or on the device of the tensor ({args[0].device})")
        tensors = [args[0], *(index for index in indices if isinstance(index, Pretend))]
    devices = {value.device for value in tensors if isinstance(value, Pretend) or value.dim() > 0}
    if len(devices) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {devices} in {func}")


def _count(func: Any, args: Any, kwargs: dict[str, Any], mine: list[Pretend]) -> None:
    target = kwargs.get("device")
    if func in WAITING and mine:
        waits(str(func))
    if func in INDEXING:
        for index in tree_flatten(args[1])[0]:
            if isinstance(index, torch.Tensor) and isinstance(args[0], Pretend):
                if not isinstance(index, Pretend):
                    waits("index on the CPU")
                elif index.dtype in (torch.bool, torch.uint8):
                    waits("boolean index")
    moves = str(func).startswith("aten._to_copy") and target is not None
    if moves and isinstance(args[0], Pretend) and torch.device(target).type == "cpu":
        waits("copy to the CPU")
    uploads = moves and not isinstance(args[0], Pretend) and torch.device(target).type == "cuda" and args[0].dim() > 0
    if uploads and not (is_pinned(args[0]) and kwargs.get("non_blocking")):
        waits("copy from pageable memory")
    if func is aten.copy_.default and not isinstance(args[0], Pretend) and isinstance(args[1], Pretend):
        waits("copy to the CPU")


class PretendMode(TorchDispatchMode):
    """While it is active, tensors made on or moved to "cuda" are `Pretend` tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("device")
        flat = tree_flatten((args, kwargs))[0]
        if any(isinstance(value, Pretend) for value in flat) or (
            target is not None and torch.device(target).type == "cuda"
        ):
            return compute(func, args, kwargs)
        return func(*args, **kwargs)


_tensor = torch.tensor


def _tensor_on(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False, **rest: Any) -> Any:
    if device is None or torch.device(device).type != "cuda":
        return _tensor(data, dtype=dtype, device=device, requires_grad=requires_grad, **rest)
    waits("torch.tensor on the device")
    return Pretend(_tensor(data, dtype=dtype), device_of(device)).requires_grad_(requires_grad)


@contextlib.contextmanager
def _fork_rng(devices: Any = None, **kwargs: Any) -> Any:
    yield


def activate(num_devices: int) -> None:
    """Makes torch of this process report that many GPUs of 80 GiB, for good."""
    warnings.filterwarnings("ignore")
    state = torch.get_rng_state()[:16]
    answers = {
        "is_available": True,
        "device_count": num_devices,
        "is_bf16_supported": True,
        "get_device_name": "pretended GPU",
        "get_device_capability": (9, 0),
        "get_rng_state": state,
        "set_rng_state": None,
        "memory_allocated": 10 << 30,
        "memory_reserved": 10 << 30,
        "mem_get_info": (60 << 30, 80 << 30),
        "get_rng_state_all": [state],
        "set_rng_state_all": None,
        "manual_seed": None,
        "_lazy_init": None,
        "empty_cache": None,
        "synchronize": None,
        "manual_seed_all": None,
    }
    for name, answer in answers.items():
        for module in (torch.cuda, torch.cuda.random):
            if hasattr(module, name):
                setattr(module, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.current_device = lambda: current[0]
    torch.cuda.set_device = lambda device: current.__setitem__(0, device if isinstance(device, int) else device.index)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.random.fork_rng = _fork_rng
    torch.tensor = _tensor_on
    torch.Tensor.pin_memory, torch.Tensor.is_pinned = pin, is_pinned  # type: ignore[assignment, method-assign]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
