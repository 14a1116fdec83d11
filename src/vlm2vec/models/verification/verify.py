"""`vlm2vec verify`: recomputes a checkpoint's vectors and compares them with the saved ones or another library's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlm2vec.errors import UserError
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.verification import compare
from vlm2vec.models.verification.golden import golden_dtype, golden_folder, verify_golden

AGAINST = ("sentence-transformers", "server", "vllm")
LOWEST = {torch.float32: 0.999, torch.bfloat16: 0.99, torch.float16: 0.99}
"""Lowest cosine that counts as equal, by precision: rounding in half precision differs between machines."""


def report_saved(source: Path, options: dict[str, Any]) -> list[str]:
    """Returns one line that says whether the saved vectors are reproduced in their original precision.

    Args:
        source: A checkpoint folder, or the name of the built-in model whose vectors are shipped.
        options: Arguments of `Embedder.from_pretrained`.

    Raises:
        UserError: if a vector differs.
    """
    folder = golden_folder(source)
    dtype = golden_dtype(folder)
    cosines = verify_golden(Embedder.from_pretrained(source, dtype=dtype, **options), folder)
    precision = str(dtype).removeprefix("torch.")
    if not cosines.min() >= LOWEST[dtype]:
        raise UserError(
            f"{source}: DIFFERENT from the saved golden vectors: lowest cosine {cosines.min():.4f} in {precision}, "
            f"expected at least {LOWEST[dtype]}"
        )
    return [
        f"{source}: EQUAL to the saved golden vectors: {len(cosines)} of {len(cosines)}, "
        f"lowest cosine {cosines.min():.6f} in {precision}"
    ]


def report_against(folder: Path, against: str, url: str, model: str, options: dict[str, Any]) -> list[str]:
    """Returns one line per input with its cosine or the reason for its rejection, then one line with the verdict.

    Raises:
        UserError: if a vector differs; the message names the first stage that differs.
    """
    if against not in AGAINST:
        raise UserError(f"--against {against}: expected one of {', '.join(AGAINST)}")
    embedder = Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu", **options)
    if against == "sentence-transformers":
        other = compare.sentence_transformers(folder, bool(embedder.backbone.template.chat))
    else:
        other = compare.server(url, model) if against == "server" else compare.vllm(folder, embedder)
    found = compare.compare(embedder, other)
    cosines = [difference.cosine for difference in found if difference.cosine is not None]
    if not cosines:
        raise UserError(f"{against} rejected every input; the first: {found[0].detail}")
    for difference in found:
        if difference.cosine is not None and difference.stage:
            raise UserError(
                f"{folder}: DIFFERENT in {against} for {difference.about} (cosine {difference.cosine:.4f}); "
                f"the first stage that differs: {difference.stage}: {difference.detail}"
            )
    lines = [
        f"{difference.about}: "
        + (f"refused there: {difference.detail}" if difference.cosine is None else f"cosine {difference.cosine:.6f}")
        for difference in found
    ]
    refused = f", {len(found) - len(cosines)} rejected" if len(cosines) < len(found) else ""
    verdict = f"EQUAL in {against}: {len(cosines)} of {len(found)} inputs, lowest cosine {min(cosines):.6f}{refused}"
    return [*lines, f"{folder}: {verdict}"]
