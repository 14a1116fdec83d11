"""`paligemma`: PaliGemma and PaliGemma 2, whose processor rejects inputs without an image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from vlm2vec.media.videos import Frames
from vlm2vec.models import st_folder
from vlm2vec.models.backbones.base import MediaTokens
from vlm2vec.models.backbones.generic import Generic


class PaliGemma(Generic):
    """As `Generic`; a text alone is written as its processor writes text after images: begin token, text, newline."""

    name: ClassVar[str] = "paligemma"
    media_tokens: ClassVar[Mapping[str, MediaTokens]] = {"paligemma": ("<image>", None)}

    def read(self, prompt: str, images: list[Any], video: Frames | None = None) -> Mapping[str, Any]:
        """Tensors of one prompt and its images."""
        if images or not prompt or self.image_token in prompt:
            return super().read(prompt, images)
        tokenizer = self.tokenizer
        begun = prompt if prompt.startswith(tokenizer.bos_token) else tokenizer.bos_token + prompt
        output = tokenizer(f"{begun}\n", add_special_tokens=False, return_tensors="pt")
        ids = output["input_ids"]
        return {
            "input_ids": ids,
            "attention_mask": output["attention_mask"],
            "token_type_ids": torch.zeros_like(ids),  # all prefix, with bidirectional attention
        }

    def write_sentence_transformers(self, folder: Path, prompts: Mapping[str, str]) -> None:
        """Writes this package's module: sentence-transformers writes a text alone without begin token and newline."""
        st_folder.write_own(folder, prompts)
