"""Sizes of images stay on the host for vision encoders of the Qwen-VL line.

These encoders split attention by the lengths of images, in each layer. On a GPU, each read of a length waits until all
work before it is done. So lengths and positions are made on the host, and positions are copied from pinned memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm2vec.models.transformers_internals import vision_sequences

SIZES = ("image_grid_thw", "video_grid_thw")
"""Inputs of these models that stay on the host, see `Batch.host`."""
ENCODERS = {
    "Qwen2VisionTransformerPretrainedModel",
    "Qwen2_5_VisionTransformerPretrainedModel",
    "Qwen3VLVisionModel",
}
"""Classes whose forward takes `grid_thw` and, where a caller has them, `cu_seqlens` and `position_ids`."""


def sizes_on_host(model: nn.Module) -> tuple[str, ...]:
    """Prepares the vision encoders of a model for sizes on the host; returns the names of the inputs that may stay."""
    encoders = [module for module in model.modules() if type(module).__name__ in ENCODERS]
    for encoder in encoders:
        encoder.register_forward_pre_hook(_with_sequences, with_kwargs=True)
    return SIZES if encoders else ()


def _with_sequences(encoder: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    sizes, device = given.get("grid_thw"), args[0].device
    if sizes is None or sizes.device == device:
        return None
    given = {**given, "grid_thw": _to(device, sizes)}
    if "flash" not in str(encoder.config._attn_implementation):  # which takes lengths on the device
        given["cu_seqlens"], positions = vision_sequences(sizes, encoder.spatial_merge_size)
        given["position_ids"] = _to(device, positions)
    return args, given


def _to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True)
