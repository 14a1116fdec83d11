"""What the vision encoder's classifier sees, as vectors: of words, or of sentences.

EfficientNet-Lite0 comes with a classifier of the 1,000 ImageNet classes. Each class has a name, and a language model
has a vector for it. A visual token can therefore start as the words for its content, before any training.

Shapes: F features, C classes, V words, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlm2vec.models.backbones.compact.parts import FINAL_DIM

NAMES = Path(__file__).with_name("class_names.txt")


class SeenClasses(nn.Module):
    """Features [.., F] -> vector [.., D] expected over the classes that the vision encoder sees.

    Not trained. The vectors are part of a saved model and of its fingerprint; the classifier is the vision encoder's.

    Args:
        classifier: The vision encoder's last layer, [C, 1280].
        vectors_CD: A vector per class.
    """

    weight_CF: torch.Tensor
    bias_C: torch.Tensor
    vectors_CD: torch.Tensor

    def __init__(self, classifier: nn.Linear, vectors_CD: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight_CF", classifier.weight.detach().float(), persistent=False)
        self.register_buffer("bias_C", classifier.bias.detach().float(), persistent=False)
        self.register_buffer("vectors_CD", vectors_CD)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Mean of the classes' vectors, weighted by the classes' probabilities."""
        seen = features[..., :FINAL_DIM].to(self.weight_CF.dtype)
        probabilities = F.linear(seen, self.weight_CF, self.bias_C).softmax(dim=-1)
        return probabilities.to(self.vectors_CD.dtype) @ self.vectors_CD


def names_of_classes() -> list[str]:
    """Name and kind of each class, such as "beagle, dog"."""
    return [line.split(maxsplit=1)[1] for line in NAMES.read_text().splitlines()]


@torch.no_grad()
def input_vectors(names: Sequence[str], words_VD: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Mean input vector of the words of each name, [names, D]."""
    ids = tokenizer(list(names), add_special_tokens=False)["input_ids"]
    return torch.stack([words_VD[row].float().mean(dim=0) for row in ids])
