"""The text side of `compact` in NumPy: a text query without PyTorch and transformers, whose import alone takes seconds.

`save_text_side` writes the sentence encoder's weights with adapters merged; `TextSide` reads them and computes the
vector of a text in float32. A test compares it with the model.

Shapes: L tokens, D embedding dim, H heads, K head dim.
"""

from __future__ import annotations

import copy
import json
import math
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
LINEARS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "mixed": "attention.output.dense",
    "wide": "intermediate.dense",
    "narrow": "output.dense",
}
NORMS = {"attention_norm": "attention.output.LayerNorm", "norm": "output.LayerNorm"}
"""Modules in a layer of BERT by their names in the file."""
ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


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
        hidden_LD = self._words([self.settings["first"], *ids, self.settings["last"]])
        for layer in range(self.settings["layers"]):
            hidden_LD = self._norm(f"{layer}.attention_norm", hidden_LD + self._attention(layer, hidden_LD))
            hidden_LD = self._norm(f"{layer}.norm", hidden_LD + self._mlp(layer, hidden_LD))
        vector_D = hidden_LD.mean(axis=0)[: self.settings["dim"]]
        unit_D: np.ndarray = (vector_D / np.linalg.norm(vector_D)).astype(np.float32)
        return unit_D

    def _words(self, ids: list[int]) -> np.ndarray:
        """Input embeddings [L, D] with their positions; the table of words is not read as a whole."""
        table = self.file.get_slice("words")
        words_LD = np.concatenate([table[i : i + 1] for i in ids])
        return self._norm("words_norm", words_LD + self.weights["positions"][: len(ids)])

    def _norm(self, name: str, hidden: np.ndarray) -> np.ndarray:
        centered = hidden - hidden.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centered**2).mean(axis=-1, keepdims=True) + self.settings["eps"])
        normed: np.ndarray = self.weights[name] * (centered / scale) + self.weights[f"{name}.bias"]
        return normed

    def _linear(self, layer: int, name: str, hidden_LD: np.ndarray) -> np.ndarray:
        product: np.ndarray = hidden_LD @ self.weights[f"{layer}.{name}"].T + self.weights[f"{layer}.{name}.bias"]
        return product

    def _attention(self, layer: int, hidden_LD: np.ndarray) -> np.ndarray:
        """Every token reads every token."""
        length, dim = len(hidden_LD), self.settings["head_dim"]
        query_HLK, key_HLK, value_HLK = (
            self._linear(layer, name, hidden_LD).reshape(length, -1, dim).transpose(1, 0, 2)
            for name in ("query", "key", "value")
        )
        scores_HLL = query_HLK @ key_HLK.transpose(0, 2, 1) / np.sqrt(dim)
        weights_HLL = np.exp(scores_HLL - scores_HLL.max(axis=-1, keepdims=True))
        weights_HLL /= weights_HLL.sum(axis=-1, keepdims=True)
        mixed_LD = (weights_HLL @ value_HLK).transpose(1, 0, 2).reshape(length, -1)
        return self._linear(layer, "mixed", mixed_LD)

    def _mlp(self, layer: int, hidden_LD: np.ndarray) -> np.ndarray:
        wide = self._linear(layer, "wide", hidden_LD)
        return self._linear(layer, "narrow", wide * _normal_cdf(wide))


def save_text_side(embedder: Embedder, folder: Path) -> None:
    """Writes what `TextSide` reads, with adapters merged, in float32 (90 MB with six layers).

    Args:
        embedder: A `compact` model, which pools by the mean.
        folder: Must exist.
    """
    from safetensors.numpy import save_file

    backbone: Any = embedder.backbone
    language, config = backbone.model.language_model, backbone.config
    embeddings, layers = language.embeddings, list(language.encoder.layer)
    # Every text is of token type 0.
    positions = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
    weights = {"words": _array(embeddings.word_embeddings.weight), "positions": _array(positions)}
    weights |= _affine("words_norm", embeddings.LayerNorm.weight, embeddings.LayerNorm.bias)
    for number, layer in enumerate(layers):
        for name, path in LINEARS.items():
            weights |= _affine(f"{number}.{name}", *_effective(layer.get_submodule(path)))
        for name, path in NORMS.items():
            norm: Any = layer.get_submodule(path)
            weights |= _affine(f"{number}.{name}", norm.weight, norm.bias)
    settings = {
        "template": backbone.template.settings(),
        "query_prompt": embedder.prompts.get("query", ""),
        "max_length": backbone.max_length,
        "first": backbone.tokenizer.cls_token_id,
        "last": backbone.tokenizer.sep_token_id,
        "layers": len(layers),
        "dim": embedder.embedding_dim,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "eps": config.layer_norm_eps,
    }
    save_file(weights, folder / WEIGHTS)
    backbone.tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
    (folder / SETTINGS).write_text(json.dumps(settings))


def _normal_cdf(values: np.ndarray) -> np.ndarray:
    """The standard normal distribution function, of which GELU is made, to 1e-7 (Abramowitz and Stegun, 7.1.26)."""
    size = np.abs(values) / math.sqrt(2)
    part = 1 / (1 + 0.3275911 * size)
    tail = np.polyval(ERF, part) * part * np.exp(-(size**2)) / 2
    cdf: np.ndarray = np.where(values < 0, tail, 1 - tail)
    return cdf


def _affine(name: str, weight: Any, bias: Any) -> dict[str, np.ndarray]:
    """Weight and bias by their names in the file."""
    return {name: _array(weight), f"{name}.bias": _array(bias)}


def _opened(path: Path) -> Any:
    """Opens a safetensors file; its tensors are read on access."""
    from safetensors import safe_open

    return safe_open(path, framework="numpy")


def _effective(linear: nn.Module) -> tuple[Any, Any]:
    """Returns weight [out, in] and bias [out] of a linear map with any adapter, from its values at the unit vectors."""
    import torch

    exact: Any = copy.deepcopy(linear).float().cpu().eval()
    with torch.inference_mode():
        bias = exact(torch.zeros(1, exact.in_features))
        weight = (exact(torch.eye(exact.in_features)) - bias).T
    return weight, bias[0]


def _array(tensor: Any) -> np.ndarray:
    array: np.ndarray = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
    return array
