"""Activations of full-width decoders, counted on tensors without storage, against the planner; and whether recipes fit.

Two decoder layers of each shipped recipe's model run at the mini-batch of the plan, in bfloat16 under autocast with
adapters on every linear layer. What autograd keeps is counted; the layers that are missing are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from planning.full_size import FULL_SIZE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextConfig, Qwen2VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextConfig, Qwen3VLTextModel

from vlm2vec.planning.cost import GIB, Inputs, layer_bytes, training_memory
from vlm2vec.planning.geometry import config_of, geometry_of
from vlm2vec.planning.plan import GPUS, chunk_tokens_for
from vlm2vec.training.chunks import training_of
from vlm2vec.training.config import load_recipe
from vlm2vec.training.recipes import find_recipe

DECODERS: dict[str, tuple[Any, Any]] = {
    "qwen2_vl": (Qwen2VLTextConfig, Qwen2VLTextModel),
    "qwen3_vl": (Qwen3VLTextConfig, Qwen3VLTextModel),
    "llava_next": (transformers.MistralConfig, transformers.MistralModel),
    "phi3_v": (transformers.Phi3Config, transformers.Phi3Model),
}
LENGTH = 512


@contextmanager
def counting(weights: Iterable[torch.Tensor]) -> Iterator[list[int]]:
    """Bytes of the storages that autograd keeps, weights left out."""
    seen = {weight.untyped_storage()._cdata for weight in weights}
    found = [0]
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            held.append(storage)  # its address is not used again
            found[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def kept_bytes(config: dict[str, Any], layers: int, tokens: int, rank: int, dropout: float) -> int:
    """What one mini-batch keeps with this many layers."""
    make_config, make_model = DECODERS[config["model_type"]]
    text = {name: value for name, value in (config.get("text_config") or config).items() if name != "model_type"}
    text |= {"num_hidden_layers": layers, "use_cache": False, "pad_token_id": 0, "vocab_size": 8}
    with torch.device("meta"):
        model = make_model._from_config(make_config(**text), dtype=torch.bfloat16, attn_implementation="sdpa")
    lora = LoraConfig(r=rank, lora_dropout=dropout, target_modules="all-linear")
    model = get_peft_model(model, lora).train()
    with FakeTensorMode():  # tensors that say they are on the CPU, so that autocast acts on them
        fakes = {name: torch.empty(b.shape, dtype=b.dtype) for name, b in model.named_buffers()}
        for name, p in model.named_parameters():
            dtype = torch.float32 if p.requires_grad else torch.bfloat16
            fakes[name] = torch.empty(p.shape, dtype=dtype, requires_grad=p.requires_grad)
        rows = max(1, tokens // LENGTH)
        inputs = {
            "inputs_embeds": torch.empty(rows, tokens // rows, text["hidden_size"], dtype=torch.bfloat16),
            "position_ids": torch.arange(tokens // rows).expand(rows, -1),
        }
        with torch.autocast("cpu", torch.bfloat16), counting(fakes.values()) as found:
            functional_call(model, fakes, (), inputs)
    return found[0]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_activations_at_full_width_are_those_of_the_plan_and_the_mini_batch_fits(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    model, gpu = geometry_of(recipe.model.base, recipe.model.options), GPUS["h100"]
    training = training_of(recipe, chunk_tokens_for(model, training_of(recipe), Inputs(), gpu.memory_gib, 8) or 0)
    tokens, dropout = training.chunk_tokens, training.dropout
    one, two = (kept_bytes(config_of(recipe.model.base), layers, tokens, training.rank, dropout) for layers in (1, 2))
    planned = layer_bytes(model, dropout > 0, mask_bytes=4) * tokens
    assert planned == pytest.approx(two - one, rel=0.1)
    on_gpu = two - one - (layer_bytes(model, dropout > 0, mask_bytes=4) - layer_bytes(model, dropout > 0)) * tokens
    memory = training_memory(model, training, Inputs(), 8)
    assert memory.total - memory.activations + model.decoder.layers * on_gpu <= gpu.memory_gib * GIB
