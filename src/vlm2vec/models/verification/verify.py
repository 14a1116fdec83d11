"""`vlm2vec verify`: a checkpoint's golden vectors, made here and now, beside the saved ones or another library's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlm2vec.errors import UserError
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.verification import compare
from vlm2vec.models.verification.golden import verify_golden

AGAINST = ("sentence-transformers", "server", "vllm")
LOWEST = 0.999


def report_saved(folder: Path, options: dict[str, Any]) -> list[str]:
    """Lines on the saved vectors, which were made in float32.

    Raises:
        UserError: if a vector differs.
    """
    cosines = verify_golden(Embedder.from_pretrained(folder, dtype=torch.float32, **options), folder)
    if cosines.min() < LOWEST:
        raise UserError(f"{folder}: the vectors differ from the saved ones (cosine {cosines.min():.4f})")
    return [f"{folder}: cosines to the saved vectors: lowest {cosines.min():.6f} of {len(cosines)}"]


def report_against(folder: Path, against: str, url: str, model: str, options: dict[str, Any]) -> list[str]:
    """Lines on every golden input: its cosine there, or why it was refused.

    Raises:
        UserError: naming the first stage that differs, if a vector does.
    """
    if against not in AGAINST:
        raise UserError(f"--against {against}: expected one of {', '.join(AGAINST)}")
    embedder = Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu", **options)
    if against == "sentence-transformers":
        other = compare.sentence_transformers(folder)
    else:
        other = compare.server(url, model) if against == "server" else compare.vllm(folder, embedder)
    found = compare.compare(embedder, other)
    if all(difference.cosine is None for difference in found):
        raise UserError(f"{against} refused every input; the first: {found[0].detail}")
    for difference in found:
        if difference.cosine is not None and difference.stage:
            raise UserError(
                f"{folder}: {against} gives another vector for {difference.about} (cosine {difference.cosine:.4f}); "
                f"the first stage that differs: {difference.stage}: {difference.detail}"
            )
    return [
        f"{difference.about}: "
        + (f"refused there: {difference.detail}" if difference.cosine is None else f"cosine {difference.cosine:.6f}")
        for difference in found
    ]
