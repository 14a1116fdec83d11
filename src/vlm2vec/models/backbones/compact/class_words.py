"""Initializes visual tokens with the class names that the vision encoder's classifier predicts for them.

EfficientNet-Lite0 comes with a classifier of the 1,000 ImageNet classes. Each class has a name, and the language model
has an input vector for every word of that name. A visual token can therefore start as the words for its content,
before any training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

NAMES = Path(__file__).with_name("class_names.txt")
# A token's last map is normalized to mean 0 and variance 1; the classifier expects the average of photographs.
MAP_MEAN, MAP_STD = 0.23, 0.66


class ClassWords(nn.Module):
    """Features [.., F] -> expected input vector [.., D] of the words of their class.

    It has no trained parameters and is not saved with a checkpoint: everything comes from the packaged parts.

    Args:
        classifier: The vision encoder's last layer, [C, 1280].
        embeddings_VD: The language model's input vectors.
        tokenizer: The language model's tokenizer.
    """

    weight_CF: torch.Tensor
    bias_C: torch.Tensor
    words_CD: torch.Tensor

    def __init__(self, classifier: nn.Linear, embeddings_VD: torch.Tensor, tokenizer: Any) -> None:
        super().__init__()
        weight_CF = classifier.weight.detach().float()
        bias_C = classifier.bias.detach().float() + MAP_MEAN * weight_CF.sum(dim=1)
        words_CD = _vectors(NAMES.read_text().splitlines(), embeddings_VD, tokenizer)
        self.register_buffer("weight_CF", MAP_STD * weight_CF, persistent=False)
        self.register_buffer("bias_C", bias_C, persistent=False)
        self.register_buffer("words_CD", words_CD, persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Mean of the classes' word vectors, weighted by the classes' probabilities."""
        logits = F.linear(features[..., : self.weight_CF.shape[1]], self.weight_CF, self.bias_C)
        return logits.softmax(dim=-1).to(self.words_CD.dtype) @ self.words_CD


@torch.no_grad()
def _vectors(lines: Sequence[str], embeddings_VD: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Mean vector of each class's name and of its kind (after the comma), equally weighted."""
    words = [line.split(maxsplit=1)[1].split(", ") for line in lines]
    texts = [f" {part}" for parts in words for part in parts]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])  # one call: a call costs more than a word
    means = [[embeddings_VD[next(ids)].float().mean(dim=0) for _ in parts] for parts in words]
    return torch.stack([torch.stack(parts).mean(dim=0) for parts in means])
