"""The text side of `compact` in NumPy: a text query without PyTorch and transformers, whose import alone takes seconds.

`save_text_side` writes the decoder's weights with adapters merged; `TextSide` reads them and computes the vector of a
text in float32. A test compares it with the model.

Shapes: L tokens, D embedding dim, H heads, G key-value heads, K head dim.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm2vec.models.prompts import PromptTemplate
from vlm2vec.types import EmbeddingInput

if TYPE_CHECKING:
    from torch import nn

    from vlm2vec.models.embedder import Embedder

WEIGHTS, SETTINGS, TOKENIZER = "text.safetensors", "text.json", "tokenizer.json"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class TextSide:
    """Encodes texts as the model would whose text side was saved.

    Args:
        folder: Written by `save_text_side`.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
        self.template = PromptTemplate(**self.settings["template"])
        self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self.file = _opened(folder / WEIGHTS)
        self.weights = {name: self.file.get_tensor(name) for name in self.file.keys() if name != "words"}  # noqa: SIM118

    def encode_query(self, inputs: Sequence[EmbeddingInput], **_: Any) -> np.ndarray:
        """Unit-norm vectors [N, D] in input order; inputs have no images."""
        return np.stack([self._vector(item) for item in inputs])

    def _vector(self, item: EmbeddingInput) -> np.ndarray:
        instruction = item.instruction or self.settings["query_prompt"] or None
        prompt = self.template.render(EmbeddingInput(item.text, (), instruction))
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids[: self.settings["max_length"]]
        hidden_LD = self._words([*ids, self.settings["end"]])
        for layer in range(self.settings["layers"]):
            hidden_LD = hidden_LD + self._attention(layer, self._norm(f"{layer}.input_norm", hidden_LD))
            hidden_LD = hidden_LD + self._mlp(layer, self._norm(f"{layer}.mlp_norm", hidden_LD))
        last_D = self._norm("norm", hidden_LD[-1])
        vector_D = (self.weights["head"] @ last_D + self.weights["head_bias"])[: self.settings["dim"]]
        unit_D: np.ndarray = (vector_D / np.linalg.norm(vector_D)).astype(np.float32)
        return unit_D

    def _words(self, ids: list[int]) -> np.ndarray:
        """Input embeddings [L, D]; the table is not read as a whole."""
        table = self.file.get_slice("words")
        return np.concatenate([table[i : i + 1] for i in ids])

    def _norm(self, name: str, hidden: np.ndarray) -> np.ndarray:
        scale = np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + self.settings["eps"])
        normed: np.ndarray = self.weights[name] * (hidden / scale)
        return normed

    def _linear(self, layer: int, name: str, hidden_LD: np.ndarray) -> np.ndarray:
        product: np.ndarray = hidden_LD @ self.weights[f"{layer}.{name}"].T
        return product

    def _attention(self, layer: int, hidden_LD: np.ndarray) -> np.ndarray:
        """Causal attention with rotary positions; groups of query heads share a key-value head."""
        length, dim = len(hidden_LD), self.settings["head_dim"]
        query_HLK, key_GLK, value_GLK = (
            self._linear(layer, name, hidden_LD).reshape(length, -1, dim).transpose(1, 0, 2) for name in LINEARS[:3]
        )
        query_HLK, key_GLK = self._rotated(query_HLK), self._rotated(key_GLK)
        repeats = len(query_HLK) // len(key_GLK)
        key_HLK, value_HLK = key_GLK.repeat(repeats, axis=0), value_GLK.repeat(repeats, axis=0)
        scores_HLL = query_HLK @ key_HLK.transpose(0, 2, 1) / np.sqrt(dim)
        scores_HLL = np.where(np.tri(length, dtype=bool), scores_HLL, -np.inf)
        weights_HLL = np.exp(scores_HLL - scores_HLL.max(axis=-1, keepdims=True))
        weights_HLL /= weights_HLL.sum(axis=-1, keepdims=True)
        mixed_LD = (weights_HLL @ value_HLK).transpose(1, 0, 2).reshape(length, -1)
        return self._linear(layer, "o_proj", mixed_LD)

    def _rotated(self, heads_HLK: np.ndarray) -> np.ndarray:
        """Rotary position embeddings, the halves of a head paired (as Llama in transformers)."""
        dim = self.settings["head_dim"]
        rates = self.settings["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
        angles_LK = np.tile(np.outer(np.arange(heads_HLK.shape[1]), rates), 2).astype(np.float32)
        left, right = np.split(heads_HLK, 2, axis=-1)
        turned: np.ndarray = heads_HLK * np.cos(angles_LK) + np.concatenate([-right, left], -1) * np.sin(angles_LK)
        return turned

    def _mlp(self, layer: int, hidden_LD: np.ndarray) -> np.ndarray:
        gate = self._linear(layer, "gate_proj", hidden_LD)
        gated = gate / (1 + np.exp(-gate)) * self._linear(layer, "up_proj", hidden_LD)
        return self._linear(layer, "down_proj", gated)


def save_text_side(embedder: Embedder, folder: Path) -> None:
    """Writes what `TextSide` reads, with adapters merged, in float32 (170 MB with four layers).

    Args:
        embedder: A `compact` model with causal attention and pooling by the last token.
        folder: Must exist.
    """
    from safetensors.numpy import save_file

    backbone: Any = embedder.backbone
    language, config = backbone.model.language_model, backbone.config
    layers = list(language.layers)
    weights = {"words": _array(language.get_input_embeddings().weight), "norm": _array(language.norm.weight)}
    weights["head"], weights["head_bias"] = _effective(backbone.model.head)
    for number, layer in enumerate(layers):
        weights[f"{number}.input_norm"] = _array(layer.input_layernorm.weight)
        weights[f"{number}.mlp_norm"] = _array(layer.post_attention_layernorm.weight)
        for name in LINEARS:
            linear = getattr(layer.self_attn, name, None) or getattr(layer.mlp, name)
            weights[f"{number}.{name}"], _ = _effective(linear)
    settings = {
        "template": backbone.template.settings(),
        "query_prompt": embedder.prompts.get("query", ""),
        "max_length": backbone.max_length,
        "end": backbone.tokenizer.eos_token_id,
        "layers": len(layers),
        "dim": embedder.embedding_dim,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_parameters["rope_theta"],
        "eps": config.rms_norm_eps,
    }
    save_file(weights, folder / WEIGHTS)
    backbone.tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
    (folder / SETTINGS).write_text(json.dumps(settings))


def _opened(path: Path) -> Any:
    """Opens a safetensors file; its tensors are read on access."""
    from safetensors import safe_open

    return safe_open(path, framework="numpy")


def _effective(linear: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Returns weight [out, in] and bias [out] of a linear map with any adapter, from its values at the unit vectors."""
    import torch

    exact: Any = copy.deepcopy(linear).float().cpu().eval()
    with torch.inference_mode():
        bias = exact(torch.zeros(1, exact.in_features))
        weight = (exact(torch.eye(exact.in_features)) - bias).T
    return _array(weight), _array(bias[0])


def _array(tensor: Any) -> np.ndarray:
    array: np.ndarray = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
    return array
