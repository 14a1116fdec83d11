"""Image features of rerankers in memory: equal scores, and each image passes the vision encoder once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny.models import draw_image

from vlm2vec import EmbeddingInput
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.models.reranking.reranker import Reranker
from vlm2vec.models.vision.feature_memory import FeatureMemory
from vlm2vec.models.vision.frozen_vision import METHOD, owner_of

TinyVlm = Callable[[str], Path]
PROMPT = RerankPrompt(system="Judge.", body="{instruction} Q: {query} D: {document}", answers=("y", "n"))
IMAGES = [draw_image(60, 60, 1), draw_image(90, 40, 2), draw_image(60, 60, 3), draw_image(70, 50, 4)]
QUERIES = [{"image": IMAGES[0], "text": "one"}, "a text", {"image": IMAGES[1], "text": "other"}]
CANDIDATES = [IMAGES[1], IMAGES[2], {"image": IMAGES[3], "text": "caption"}, "a text", IMAGES[0]]


def load(folder: Path) -> Reranker:
    return Reranker.from_pretrained(str(folder), prompt=PROMPT, device="cpu", dtype=torch.float32)


def scores(reranker: Reranker) -> np.ndarray:
    return np.stack([reranker.score(query, CANDIDATES) for query in QUERIES])


def plain_scores(reranker: Reranker) -> np.ndarray:
    """Scores with the model's own method."""
    object.__delattr__(owner_of(reranker.backbone.model), METHOD)
    return scores(reranker)


@pytest.mark.parametrize(
    ("family", "units"),
    [("qwen2_vl", 4), ("qwen3_vl", 4), ("llava", 4), ("gemma3", 4), ("mistral3", 4), ("internvl", 18)],
)
def test_each_image_or_tile_is_encoded_once_and_scores_are_equal(family: str, units: int, tiny_vlm: TinyVlm) -> None:
    reranker = load(tiny_vlm(family))
    assert reranker.image_features is not None
    first, again = scores(reranker), scores(reranker)
    assert reranker.image_features.num_encoded == units
    expected = plain_scores(reranker)
    np.testing.assert_allclose(first, expected, atol=5e-6)
    np.testing.assert_allclose(again, expected, atol=5e-6)
    assert np.ptp(expected) > 0.1


@pytest.mark.parametrize("family", ["llava_onevision", "idefics3"])
def test_features_that_cannot_be_told_apart_are_computed_as_usual(family: str, tiny_vlm: TinyVlm) -> None:
    reranker = load(tiny_vlm(family))
    assert reranker.image_features is not None
    found = scores(reranker)
    assert reranker.image_features.num_encoded == 0
    np.testing.assert_array_equal(found, plain_scores(reranker))


def test_without_memory_every_image_is_encoded_again_and_scores_are_equal(tiny_vlm: TinyVlm) -> None:
    reranker = load(tiny_vlm("qwen2_vl"))
    network = reranker.backbone.model
    expected = plain_scores(reranker)
    memory = FeatureMemory(network, max_bytes=0)
    np.testing.assert_allclose(scores(reranker), expected, atol=5e-6)
    assert memory.num_encoded > 4


def test_training_passes_are_left_alone(tiny_vlm: TinyVlm) -> None:
    reranker = load(tiny_vlm("llava"))
    assert reranker.image_features is not None
    batch = reranker.backbone.process([reranker.pair(*map(EmbeddingInput.of, (QUERIES[0], IMAGES[1])))])
    reranker.scorer(batch).sum().backward()
    assert reranker.image_features.num_encoded == 0
