"""`mllama`: Llama 3.2 Vision, whose text layers attend to images by cross attention instead of reading image tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch

from vlm2vec.batch import Batch
from vlm2vec.models import st_folder
from vlm2vec.models.backbones.generic import Generic


class Mllama(Generic):
    """As `Generic`; examples with the same number of images pass the network together.

    Image tensors have a slot for every image of an example, and a token before the first image attends to all slots
    equally, padding included. Only in batches of equal image counts does a vector not depend on the other examples.
    """

    name: ClassVar[str] = "mllama"

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Final-norm hidden states [B, L, D]."""
        own = [name for name in batch.tensors if name not in (*batch.rows, "cross_attention_mask")]
        if not any(len(batch[name]) for name in batch.rows):
            return super().hidden_states(Batch({name: batch[name] for name in own}, {}, batch.padded))
        device = batch["input_ids"].device
        counts_B = torch.zeros(len(batch), dtype=torch.long, device=device)
        with_images = batch.rows["aspect_ratio_ids"].to(device).bool()
        counts_B[with_images] = (batch["aspect_ratio_ids"] > 0).sum(dim=1)  # 0 is padding
        places, states = [], []
        for count in sorted(set(counts_B.tolist())):
            places.append((counts_B == count).nonzero().squeeze(1))
            tensors = {name: batch[name][places[-1]] for name in own}
            if count:
                packed = (counts_B[with_images] == count).nonzero().squeeze(1)
                tensors |= {name: batch[name][packed, :count] for name in batch.rows}
                tensors["cross_attention_mask"] = batch["cross_attention_mask"][places[-1], :, :count]
            states.append(super().hidden_states(Batch(tensors, {}, batch.padded)))
        return torch.cat(states)[torch.cat(places).argsort()]

    def write_sentence_transformers(self, folder: Path, prompts: Mapping[str, str]) -> None:
        """Writes this package's module: sentence-transformers lets a text attend to the padding of images."""
        st_folder.write_own(folder, prompts)
