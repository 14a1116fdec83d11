"""What the vision encoder's own classifier sees in a part of an image, as words that the language model knows.

EfficientNet-Lite0 comes with a classifier of the 1,000 ImageNet classes. Each class has a name, and the language model
an input vector for every word of it: so a visual token can begin as the words for what is there, before anything was
trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

NAMES = Path(__file__).with_name("class_names.txt")
# A token's last map is normalised to mean 0 and variance 1; the classifier expects what photographs have on average.
MAP_MEAN, MAP_STD = 0.23, 0.66


class ClassWords(nn.Module):
    """Features [.., F] -> the expected input vector [.., D] of the class's words.

    Nothing here is trained, and nothing is saved with a checkpoint: it all comes from the packaged parts.

    Args:
        classifier: The vision encoder's last layer, [C, 1280].
        embeddings_VD: The language model's input vectors.
        tokenizer: The language model's.
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
        """The mean of the classes' words, weighted by their probabilities."""
        logits = F.linear(features[..., : self.weight_CF.shape[1]], self.weight_CF, self.bias_C)
        return logits.softmax(dim=-1).to(self.words_CD.dtype) @ self.words_CD


@torch.no_grad()
def _vectors(lines: Sequence[str], embeddings_VD: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Of each class's name and, after the comma, the kind of thing it is, both alike; an offset stands first."""
    words = [line.split(maxsplit=1)[1].split(", ") for line in lines]
    texts = [f" {part}" for parts in words for part in parts]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])  # in one call: a call costs more than a word
    means = [[embeddings_VD[next(ids)].float().mean(dim=0) for _ in parts] for parts in words]
    return torch.stack([torch.stack(parts).mean(dim=0) for parts in means])
