"""Saved rerankers load in sentence-transformers' CrossEncoder, with equal scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from tiny.models import draw_image

from vlm2vec import Embedder, UserError
from vlm2vec.models.reranking.pair_model import PairModel
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.models.reranking.reranker import Reranker

TinyVlm = Callable[[str], Path]
RED, WIDE = draw_image(60, 60, 1), draw_image(90, 40, 2)
QUERY, CANDIDATES = {"image": RED, "text": "red"}, ["a dog", RED, {"image": WIDE, "text": "wide"}]
PROMPT = RerankPrompt(system="Judge.", body="{instruction} Q: {query} D: {document}", answers=("y", "n"))


def of_vlm(folder: Path) -> PairModel:
    return PairModel.of(Embedder.from_pretrained(folder, device="cpu", dtype=torch.float32), PROMPT)


def of_built_in() -> PairModel:
    """The smallest built-in model with a head that gives different scores."""
    options: dict[str, Any] = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}
    embedder = Embedder.from_pretrained("compact", device="cpu", dtype=torch.float32, **options)
    model = PairModel.of(embedder, PROMPT, scalar_head=True)
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("kind", ["a head of answers", "a scalar head"])
def test_a_saved_reranker_gives_the_same_probabilities_in_cross_encoder(
    kind: str, tiny_vlm: TinyVlm, tmp_path: Path
) -> None:
    model = of_vlm(tiny_vlm("qwen2_vl")) if kind == "a head of answers" else of_built_in()
    folder = model.save_pretrained(tmp_path / "saved")
    reranker = Reranker.from_pretrained(str(folder), device="cpu", dtype=torch.float32)
    log_odds = reranker.score(QUERY, CANDIDATES, instruction="Find it.")
    assert np.ptp(log_odds) > 1e-2
    theirs = CrossEncoder(str(folder), trust_remote_code=True, device="cpu", model_kwargs={"dtype": torch.float32})
    found = theirs.predict([(QUERY, candidate) for candidate in CANDIDATES], prompt="Find it.")
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-log_odds)), atol=1e-5)
    ranked = theirs.rank(QUERY, CANDIDATES, prompt="Find it.")
    assert [row["corpus_id"] for row in ranked] == np.argsort(-log_odds).tolist()
    theirs.save_pretrained(str(tmp_path / "again"))
    again = Reranker.from_pretrained(str(tmp_path / "again"), device="cpu", dtype=torch.float32)
    np.testing.assert_array_equal(again.score(QUERY, CANDIDATES, instruction="Find it."), log_odds)


def test_a_built_in_model_has_no_head_of_answers() -> None:
    embedder = Embedder.from_pretrained("compact", device="cpu", num_layers=1)
    with pytest.raises(UserError, match=r"compact: has no lm_head\.weight; expected .* trained reranker"):
        PairModel.of(embedder, PROMPT)


def test_a_damaged_folder_is_one_clear_line(tiny_vlm: TinyVlm, tmp_path: Path) -> None:
    folder = of_vlm(tiny_vlm("qwen2_vl")).save_pretrained(tmp_path / "saved")
    text = (folder / "reranker.json").read_text()
    (folder / "reranker.json").write_text(text.replace('"system"', '"sytem"'))
    with pytest.raises(UserError, match=r"the prompt of reranker\.json is not valid"):
        Reranker.from_pretrained(str(folder))
    (folder / "reranker.json").write_text(text.replace('"format"', '"fromat"'))
    with pytest.raises(UserError, match=r"reranker\.json: unknown key fromat"):
        Reranker.from_pretrained(str(folder))
