"""Texts longer than the model reads are counted and reported once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny.dual import DUAL

from vlm2vec import Embedder, EmbeddingInput
from vlm2vec.batch import Batch

SMALL = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}


@pytest.mark.parametrize("source", ["compact", "compact-dual", *DUAL])
def test_a_text_that_is_too_long_is_counted_and_reported_once(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if source in DUAL:
        DUAL[source](tmp_path)
    options = {} if source in DUAL else SMALL
    embedder = Embedder.from_pretrained(tmp_path if source in DUAL else source, dtype=torch.float32, **options)
    caplog.clear()
    limit = embedder.max_length
    assert limit is not None
    embedder.encode(["short", "a dog"])
    assert embedder.num_truncated == 0 and not caplog.text
    long = [" ".join(["word"] * limit) + end for end in (" cat", " dog", " fish")]
    vectors = embedder.encode([*long, "short", long[0]])
    assert embedder.num_truncated == 3, "equal inputs are encoded once"
    assert (vectors[0] == vectors[1]).all(), "the end of the text was not read"
    assert caplog.text.count("text tokens too long") == 1 and f"reads the first {limit}" in caplog.text
    embedder.backbone.process([EmbeddingInput(long[1])])  # as training does
    assert embedder.num_truncated == 4 and caplog.text.count("text tokens too long") == 1


def test_compact_says_how_many_tokens_it_dropped_and_keeps_the_vectors_of_the_first_510() -> None:
    embedder = Embedder.from_pretrained("compact", dtype=torch.float32, **SMALL)
    words = [" word"] * 520
    ids = embedder.backbone.tokenizer("".join(words), add_special_tokens=False)["input_ids"]
    batch = embedder.backbone.process([EmbeddingInput("".join(words)), EmbeddingInput("a dog")])
    assert batch.dropped == (len(ids) - 510, 0)
    tokenizer = embedder.backbone.tokenizer
    assert batch["input_ids"][0].tolist() == [tokenizer.cls_token_id, *ids[:510], tokenizer.sep_token_id]


def test_a_family_that_reads_whole_texts_has_no_limit(tiny_vlm) -> None:
    embedder = Embedder.from_pretrained(tiny_vlm("llava"), dtype=torch.float32)
    assert embedder.max_length is None
    embedder.encode(["word " * 300])
    assert embedder.num_truncated == 0


def test_dropped_tokens_follow_their_examples_through_a_batch() -> None:
    ids = torch.arange(8).view(4, 2)
    left, right = Batch({"input_ids": ids[:2]}, dropped=(5, 0)), Batch({"input_ids": ids[2:]})
    whole = Batch.join([left, right])
    assert whole.dropped == (5, 0, 0, 0) and Batch.join([right, right]).dropped == ()
    assert whole.slice(0, 1).dropped == (5,) and whole.slice(1, 3).dropped == (0, 0)
    assert whole.select([3, 0]).dropped == (0, 5) and right.select([1]).dropped == ()
    assert [part.dropped for part in whole.split(2)] == [(5, 0), (0, 0)]
