"""Parameters, gradients and optimiser state cut over the processes (FSDP2), and what that asks of a step.

A sharded layer is gathered when it runs, by all processes together. So in a step every process must run the same layers
equally often: all cut their batch into the same number of chunks, and only layers of the language model, which every
input passes through, are shards of their own. The rest is one shard, of which every chunk uses all (`_use_all`).

What is saved is whole, whatever the layout: a checkpoint of one loads in the other. accelerate knows sharding on GPUs
only, so torch's own `fully_shard` is called here, and the Trainer told that the model is sharded already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vlm2vec.errors import UserError
from vlm2vec.training.gather import rank, world_size


def shard(embedder: Any, kept_whole: Iterable[nn.Parameter], in_half: bool = False) -> None:
    """Shards a model's parameters over the ranks, in place.

    Args:
        embedder: With a `backbone`, whose `model` it is.
        kept_whole: Parameters that every rank holds.
        in_half: Layers are gathered in bfloat16, half the traffic and memory; gradients are reduced in float32, and the
            vectors stay float32. Shards keep the parameters' own dtype.
    """
    _use_all(embedder.backbone)
    mesh = init_device_mesh(embedder.device.type, (world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if in_half else None,
        reduce_dtype=torch.float32 if in_half else None,
        cast_forward_inputs=False,  # autocast decides the dtype of each operation, as without shards
    )
    for layer in _language_layers(embedder.backbone):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(embedder, mesh=mesh, mp_policy=policy, ignored_params=set(kept_whole))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the parts of all processes; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights of a sharded model that a checkpoint may hold, on the CPU of rank 0.

    Every rank must call it. The others get an empty dictionary: a machine holds the complete model once, not once per
    rank.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    everything = trained == {name for name, _ in model.named_parameters()}
    state = {}
    for name, value in model.state_dict().items():
        if everything or name in trained:
            complete = whole(value.detach())
            if rank() == 0:
                state[name] = complete.cpu()
    return state


def _use_all(backbone: Any) -> None:
    """Makes every forward pass use every trained parameter outside the language model's layers, by a term of zero.

    A chunk without images would leave the gradients of a trained vision side out, and the processes' sums, which are
    made of all gradients of a shard at once, would not fit each other.
    """
    inside = {id(parameter) for layer in _language_layers(backbone) for parameter in layer.parameters()}
    places = [
        (module, name)
        for module in backbone.model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and id(parameter) not in inside
    ]

    def add_nothing(module: nn.Module, inputs: Any, output_BD: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return output_BD
        parts = [getattr(owner, name).reshape(-1)[:1].sum() for owner, name in places]
        return output_BD + 0 * torch.stack(parts).sum() if parts else output_BD

    backbone.register_forward_hook(add_nothing)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The complete optimizer state by parameter name, on rank 0; every rank must call it, the others get no state."""
    state: dict[str, dict[str, Any]] = {}
    for name, mine in _states(model, optimizer):
        for key, value in mine.items():
            complete = whole(value) if isinstance(value, torch.Tensor) else value
            if rank() == 0:
                complete = complete.cpu() if isinstance(complete, torch.Tensor) else complete
                state.setdefault(name, {})[key] = complete
    return {"state": state}


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads a saved state, each rank its shard. Settings such as the learning rate stay those of `optimizer`.

    Args:
        model: Whose parameters are optimized.
        optimizer: Gets the state.
        saved: From `optimizer_state`, with any number of ranks.
    """
    for name, parameter in model.named_parameters():
        if name in saved["state"]:
            optimizer.state[parameter] = {
                key: _like(parameter, value) if isinstance(value, torch.Tensor) else value
                for key, value in saved["state"][name].items()
            }


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            yield name, optimizer.state[parameter]


def _like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if value.shape != parameter.shape or value.dim() == 0:  # a count of steps
        return value
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _language_layers(backbone: Any) -> list[nn.Module]:
    """The repeated layers of the language model; none where the family does not say which part that is."""
    try:
        language: nn.Module = backbone.language_model
    except UserError:
        return []
    lists = [module for module in language.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return list(max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=[]))
