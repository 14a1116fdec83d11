"""Loads rerankers: folders of trained rerankers, and models that generate text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlm2vec.errors import UserError
from vlm2vec.models import loading
from vlm2vec.models.checkpoints import hub
from vlm2vec.models.checkpoints.tensors import load_tensors, read_model
from vlm2vec.models.device import floating_type, process_device
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.loading import LoadSettings
from vlm2vec.models.reranking.cross_encoder import is_cross_encoder, load_cross_encoder
from vlm2vec.models.reranking.folder import HEAD_FILE, RerankerFile
from vlm2vec.models.reranking.pair_model import PairModel
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.models.reranking.scalar_head import HEADS
from vlm2vec.models.st_folder import RERANKER_FILE


def load_reranker(folder: Path, settings: LoadSettings, prompt: RerankPrompt | None = None) -> PairModel:
    """Loads a folder that `PairModel.write_files` wrote.

    Args:
        folder: The folder.
        settings: As for an embedding model.
        prompt: Wording of the prompt. Default: that of the folder.

    Raises:
        UserError: if a file is not valid, or the tensors do not fit.
    """
    about = read_model(folder / RERANKER_FILE, RerankerFile)
    backbone, base, revision = loading.load_backbone(folder, about, settings)
    backbone.pooling, backbone.attention = about.pooling, about.attention
    head = HEADS[about.head](backbone.pooled_dim)
    try:
        head.load_state_dict(load_tensors(folder / HEAD_FILE))
        saved = RerankPrompt(**{**about.prompt, "answers": tuple(about.prompt["answers"])})
    except (RuntimeError, TypeError, KeyError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: {HEAD_FILE} or the prompt of reranker.json is not valid ({detail})") from error
    model = PairModel(Embedder(backbone, base, revision), prompt or saved, head, about.trained_head)
    return model.to(settings.device).eval()


def load_pair_model(
    source: str | Path,
    prompt: RerankPrompt | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    **options: Any,
) -> PairModel:
    """Loads a trained reranker or a CrossEncoder folder, or makes one of a model that generates text.

    Args:
        source: A folder or hub id.
        prompt: Wording of the prompt. Default: that of the trained reranker, otherwise of Qwen3-VL-Reranker.
        device: Device of the weights. Default: CUDA if available, else the CPU.
        dtype: Data type of the base weights, or its name. Default: `best_dtype(device)`.
        revision: Hub revision of `source`.
        **options: Other options of `Embedder.from_pretrained`.

    Raises:
        UserError: if the source cannot be loaded, is a dual encoder, or has no language-model head.
    """
    folder = hub.local_folder(str(source), revision)
    own = (folder / RERANKER_FILE).is_file()
    if not own and not is_cross_encoder(folder):
        embedder = Embedder.from_pretrained(source, device=device, dtype=dtype, revision=revision, **options)
        return PairModel.of(embedder, prompt or RerankPrompt())
    where = process_device(device)
    base = options.pop("base", None)
    settings = LoadSettings(floating_type(dtype, where), base, None, None, options, where)
    return load_reranker(folder, settings, prompt) if own else load_cross_encoder(folder, settings, prompt)
