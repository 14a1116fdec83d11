"""Reads the two rows of a language-model head that a yes-or-no answer needs.

Embedding models are loaded without their head. Only two rows of D values are read from the weight files instead of the
whole matrix of vocabulary x D.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vlm2vec.errors import UserError, shown
from vlm2vec.models.backbones.base import Backbone

HEAD = "lm_head.weight"


def answer_direction(
    backbone: Backbone, source: str, revision: str | None, answers: tuple[str, str]
) -> torch.Tensor | None:
    """Returns the head row of the first answer minus that of the second, float32, shape [D]; None without a head.

    Its product with the last hidden state is the difference of the two answers' logits.

    Args:
        backbone: Its tokenizer gives the row numbers; its input embeddings are used if the head is tied to them.
        source: Folder or hub id of the base weights.
        revision: Hub revision of `source`.
        answers: Two words of one token each.

    Raises:
        UserError: if an answer is not one token.
    """
    if not backbone.generates:
        return None
    file = next((path for path in weight_files(source, revision) if _head_name(path)), None)
    embeddings_VD = _tied_embeddings(backbone) if file is None else None
    if file is not None:
        rows = _rows_of_file(file, _token_ids(backbone, answers))
    elif embeddings_VD is not None:
        rows = embeddings_VD[_token_ids(backbone, answers)].cpu()
    else:
        return None
    return rows[0].float() - rows[1].float()


def weight_files(source: str, revision: str | None) -> list[Path]:
    """The safetensors files of a folder, or of a hub id as they are in the hub's cache after loading."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            patterns = ["*.safetensors"]
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError):
            return []
    return sorted(folder.glob("*.safetensors"))


def _token_ids(backbone: Backbone, answers: tuple[str, str]) -> list[int]:
    return [_single_token(backbone, answer) for answer in answers]


def _single_token(backbone: Backbone, answer: str) -> int:
    ids: list[int] = backbone.tokenizer.encode(answer, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(
            f"rerank: answer {shown(answer)} is {len(ids)} tokens of {backbone.name}; expected a word of one token"
        )
    return ids[0]


def _head_name(path: Path) -> str | None:
    with safe_open(path, framework="pt") as file:
        return next((key for key in file.keys() if key.endswith(HEAD)), None)  # noqa: SIM118


def _rows_of_file(path: Path, ids: list[int]) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        matrix = file.get_slice(_head_name(path))
        return torch.cat([matrix[i : i + 1] for i in ids])


def _tied_embeddings(backbone: Backbone) -> torch.Tensor | None:
    """Returns the input embeddings if the head of the model is tied to them."""
    model: Any = backbone.model
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    tied = getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False)
    if not tied or not hasattr(model, "get_input_embeddings"):
        return None
    weight: torch.Tensor = model.get_input_embeddings().weight
    return weight.detach()
