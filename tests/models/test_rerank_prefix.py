"""The shared prefix of a query's prompts: scores as of whole prompts, in every tiny family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny.models import FAMILIES, draw_image

from vlm2vec import EmbeddingInput
from vlm2vec.models.encoding.pipeline import Pipeline
from vlm2vec.models.encoding.settings import EncodeSettings
from vlm2vec.models.reranking.prefix import SharedPrefix
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.models.reranking.reranker import Reranker

TinyVlm = Callable[[str], Path]
PROMPT = RerankPrompt(system="Judge.", body="{instruction} Q: {query} D: {document}", answers=("y", "n"))
IMAGES = [draw_image(60, 60, 1), draw_image(90, 40, 2), draw_image(60, 60, 3)]
QUERIES = [{"image": IMAGES[0], "text": "one"}, "a text", {"image": IMAGES[1], "text": "other"}]
CANDIDATES = [IMAGES[1], IMAGES[2], {"image": IMAGES[0], "text": "caption"}, "a text", "a longer text than the others"]
SHARED = {
    "all": ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "internvl"),
    "some": ("llava_onevision", "idefics3", "smolvlm"),  # an image is processed by how many there are, or padded
}


def load(folder: Path) -> Reranker:
    return Reranker.from_pretrained(str(folder), prompt=PROMPT, device="cpu", dtype=torch.float32)


def both(reranker: Reranker, query: object) -> tuple[np.ndarray, np.ndarray, int]:
    """Scores with the prefix computed once, scores of whole prompts, and the number of pairs that shared it."""
    asked = EmbeddingInput.of(query)
    pairs = [reranker.pair(asked, EmbeddingInput.of(candidate)) for candidate in CANDIDATES]
    sharing = SharedPrefix(reranker.scorer, asked)
    settings = EncodeSettings(batch_size=2)
    found, expected = (
        np.concatenate([part.vectors for part in Pipeline(scorer, settings).stream(pairs)])[:, 0]
        for scorer in (sharing, reranker.scorer)
    )
    return found, expected, sharing.num_shared


@pytest.mark.parametrize("family", list(FAMILIES))
def test_scores_with_a_shared_prefix_equal_those_of_whole_prompts(family: str, tiny_vlm: TinyVlm) -> None:
    reranker = load(tiny_vlm(family))
    shared = []
    for query in QUERIES:
        found, expected, num = both(reranker, query)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.ptp(expected) > 1e-3
        shared.append(num)
    if family in SHARED["all"]:
        assert shared == [len(CANDIDATES)] * 3
    elif family in SHARED["some"]:
        assert shared[1] == len(CANDIDATES)  # the query without an image
    else:
        assert shared == [0] * 3  # sliding windows, recurrent states, or images that attend to what follows


def test_bidirectional_models_share_nothing(tiny_vlm: TinyVlm) -> None:
    reranker = load(tiny_vlm("qwen2_vl"))
    reranker.scorer.embedder.backbone.attention = "bidirectional"
    found, expected, num = both(reranker, QUERIES[0])
    np.testing.assert_array_equal(found, expected)
    assert num == 0


def test_the_reranker_computes_the_prefix_once_and_then_the_rest(tiny_vlm: TinyVlm) -> None:
    reranker = load(tiny_vlm("qwen2_vl"))
    lengths: list[int] = []
    network = reranker.backbone.model

    def record(module: torch.nn.Module, args: object, given: dict[str, torch.Tensor]) -> None:
        lengths.append(given["input_ids"].shape[1])

    network.register_forward_pre_hook(record, with_kwargs=True)
    reranker.score("a text", ["one", "two", "three"])
    prefix, *rest = lengths
    assert len(rest) == 1 and rest[0] < prefix
