"""Shards parameters, gradients and optimizer state over the ranks (FSDP2).

A sharded layer is all-gathered whenever it runs, so every rank must run the same layers the same number of times. All
ranks therefore split their batch into the same number of chunks, and only the layers of the language model, which every
input passes, are separate FSDP units. All other parameters form one unit, and every chunk uses all of them
(`_use_all`).

Checkpoints contain complete tensors, so sharded and unsharded runs can load each other's checkpoints. accelerate
supports FSDP2 on GPUs only, so this module calls torch's `fully_shard` and tells the Trainer that the model is already
sharded.
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
        embedder: The embedder; `backbone.model` is sharded.
        kept_whole: Parameters that every rank keeps completely.
        in_half: Whether to gather layers in bfloat16, which halves traffic and memory. Gradients are reduced in
            float32, embeddings stay float32, and shards keep the dtype of the parameters.
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
    """Gathers the complete tensor from its shards; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gathers the weights of a sharded model for a checkpoint, on the CPU of rank 0.

    Every rank must call it. The other ranks get an empty dictionary, so that a machine holds the complete model once
    instead of once per rank.
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
    """Makes every forward pass use all trained parameters outside the language model's layers, through a zero term.

    Otherwise a chunk without images would give no gradient for a trained vision encoder, and the reduce-scatter of the
    FSDP unit, which covers all its gradients, would not match between the ranks.
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
    """Gathers the complete optimizer state by parameter name on rank 0; every rank must call it."""
    state: dict[str, dict[str, Any]] = {}
    for name, mine in _states(model, optimizer):
        for key, value in mine.items():
            complete = whole(value) if isinstance(value, torch.Tensor) else value
            if rank() == 0:
                complete = complete.cpu() if isinstance(complete, torch.Tensor) else complete
                state.setdefault(name, {})[key] = complete
    return {"state": state}


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads this rank's shard of a saved state. Settings such as the learning rate stay those of `optimizer`.

    Args:
        model: The model that is optimized.
        optimizer: The optimizer to load the state into.
        saved: Result of `optimizer_state`, saved with any number of ranks.
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
    if value.shape != parameter.shape or value.dim() == 0:  # step counter
        return value
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _language_layers(backbone: Any) -> list[nn.Module]:
    """Returns the repeated layers of the language model; empty if the family does not declare its language model."""
    try:
        language: nn.Module = backbone.language_model
    except UserError:
        return []
    lists = [module for module in language.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return list(max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=[]))
