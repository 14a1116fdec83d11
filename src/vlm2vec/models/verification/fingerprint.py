"""Describes everything that an embedder's vectors depend on besides the input, as hashes and plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch

from vlm2vec.models.embedder import Embedder

LIBRARIES = ("vlm2vec", "torch", "transformers", "pillow", "numpy")
ADAPTER_PARTS = ("lora_", "modules_to_save", "adapter")
HASHED_AT_ONCE = 1 << 26


def describe(embedder: Embedder, model: str) -> dict[str, str]:
    """Describes an embedder; two embedders with equal descriptions give equal vectors.

    Args:
        embedder: The embedder in the state in which it will encode.
        model: The user's name of the model; it distinguishes a changed model from a different model.

    Returns:
        Values by name: hashes of base weights, adapter, template and processor; precision, device, versions.
    """
    tensors = embedder.state_dict()
    adapter = {name for name in tensors if any(part in name for part in ADAPTER_PARTS)}
    backbone = embedder.backbone

    def hashes() -> dict[str, str]:
        return {
            "weights": _hash_tensors((name, tensors[name]) for name in sorted(tensors) if name not in adapter),
            "adapter": _hash_tensors((name, tensors[name]) for name in sorted(adapter)) if adapter else "none",
        }

    weights = hashes() if embedder.origin is None else embedder.origin.remembered(tensors, hashes)
    return {
        "model": model,
        **weights,
        "template": template_hash(embedder),
        "processor": _hash_text(_processor_text(backbone)),
        "resolution": resolution(backbone),
        "precision": str(embedder.dtype).removeprefix("torch."),
        "pooling": backbone.pooling,
        # Omitted if causal, so that vectors cached before the setting existed keep their fingerprint.
        **({} if backbone.attention == "causal" else {"attention": backbone.attention}),
        **({} if embedder.truncate_dim is None else {"dimensions": str(embedder.truncate_dim)}),
        "device": embedder.device.type,
        "libraries": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
    }


def resolution(backbone: Any) -> str:
    """Returns the image size that reaches the model, from its processor or family; otherwise "the family's own"."""
    processor = getattr(getattr(backbone, "processor", None), "image_processor", None)
    settings = {**(processor.to_dict() if processor is not None else {}), **backbone.options()}
    own = ("image_size", "do_resize", "visual_tokens", "image_grid_pinpoints", "max_patches", "num_crops")
    names = ("resolution", "min_pixels", "max_pixels", "size", "crop_size", *own)
    found = [f"{name} {settings[name]}" for name in names if settings.get(name) is not None]
    return ", ".join(found) or "the family's own"


def template_hash(embedder: Embedder) -> str:
    """Returns a hash of the template, the image token and the chat template of a backbone."""
    backbone: Any = embedder.backbone
    facts = {
        "template": backbone.template.settings(),
        "image_token": getattr(backbone, "image_token", None),
        "chat_template": getattr(backbone.tokenizer, "chat_template", None),
    }
    if default := embedder.prompts.get("default"):
        facts["default_prompt"] = default
    return _hash_text(json.dumps(facts, sort_keys=True, default=str))


def _processor_text(backbone: Any) -> str:
    """Returns the image and token settings: the processor as saved by transformers, and the family's options."""
    settings: dict[str, Any] = {"options": backbone.options(), "class": type(backbone).__name__}
    processor = getattr(backbone, "processor", None)
    for name in ("image_processor", "video_processor", "feature_extractor"):
        part = getattr(processor, name, None)
        if part is not None:
            settings[name] = part.to_dict()
    settings["padding_side"] = getattr(backbone.tokenizer, "padding_side", None)
    settings["vocabulary"] = _hash_text(json.dumps(backbone.tokenizer.get_vocab(), sort_keys=True))
    return json.dumps(settings, sort_keys=True, default=str)


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _hash_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)
        for part in torch.split(flat, HASHED_AT_ONCE):
            digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
