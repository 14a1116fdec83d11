from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny.dual import build_clip
from tiny.models import draw_image

from vlm2vec import Embedder, UserError
from vlm2vec.models.checkpoints import known
from vlm2vec.models.pooling import POOLINGS
from vlm2vec.models.prompts import PromptTemplate
from vlm2vec.models.registry import BACKBONES
from vlm2vec.types import EmbeddingInput

ROWS = {row.ids[0]: row for row in known.table().checkpoints}
IMAGE = draw_image(40, 30, 0)
QWEN = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
HELPFUL = "You are a helpful assistant."
REPRESENT = "Represent the user's input."
STARTED = "<|vision_start|><|image_1|><|vision_end|>"
LLAMA = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n"
SUMMARY = "\nSummary above {} in one word: "
SUMMARIZE = "\nSummarize above {} in one word: "

# By template: the prompts of "a cat", of an image, and of both with the instruction "Find it.", written out by hand
# from the sources that the rows name.
PROMPTS = {
    None: ["a cat", "<|image_1|>\n", "<|image_1|>\nFind it. a cat\n"],
    "gme": [
        QWEN.format(system=HELPFUL, user="a cat") + "<|endoftext|>",
        QWEN.format(system=HELPFUL, user=STARTED) + "<|endoftext|>",
        QWEN.format(system="Find it.", user=STARTED + "a cat") + "<|endoftext|>",
    ],
    "qwen3-vl-embedding": [
        QWEN.format(system=REPRESENT, user="a cat"),
        QWEN.format(system=REPRESENT, user=STARTED),
        QWEN.format(system="Find it.", user=STARTED + "a cat"),
    ],
    "lamra": [
        QWEN.format(system=HELPFUL, user="a cat" + SUMMARIZE.format("sentence")),
        QWEN.format(system=HELPFUL, user=STARTED + SUMMARIZE.format("image")),
        QWEN.format(system=HELPFUL, user=STARTED + "Find it. a cat" + SUMMARIZE.format("image and sentence")),
    ],
    "e5-v": [
        LLAMA.format("a cat" + SUMMARY.format("sentence")),
        LLAMA.format("<|image_1|>" + SUMMARY.format("image")),
        LLAMA.format("<|image_1|>Find it. a cat" + SUMMARY.format("image and sentence")),
    ],
    "unime-phi": [
        "<|user|>\na cat" + SUMMARY.format("sentence") + "<|end|>\n<|assistant|>\n",
        "<|user|>\n<|image_1|>" + SUMMARY.format("image") + "<|end|>\n<|assistant|>\n",
        "<|user|>\n<|image_1|>\nFind it. a cat" + SUMMARY.format("image and sentence") + "<|end|>\n<|assistant|>\n",
    ],
    "unime-llava": [
        "[INST] a cat" + SUMMARY.format("sentence") + "[/INST]",
        "[INST] <|image_1|>" + SUMMARY.format("image") + "[/INST]",
        "[INST] <|image_1|>\nFind it. a cat" + SUMMARY.format("image and sentence") + "[/INST]",
    ],
    "embeddinggemma-2": ["a cat", "<|image_1|>", "<|image_1|>Find it.a cat"],
    "mme5": [
        "a cat",
        "<|image_1|><|begin_of_text|>",
        "<|image_1|><|begin_of_text|>Find it. a cat\n",
    ],
}


CURRENT = [
    *("wemm-embedding-2b", "wemm-embedding-4b", "wemm-embedding-9b", "ovis-vl-embedding-2b", "ovis-vl-embedding-9b"),
    *("embeddinggemma-2", "jina-embeddings-v4", "jina-embeddings-v5-omni-small", "llama-nemotron-embed-vl-1b-v2"),
]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_row_says_its_source_and_gives_the_published_prompts(row):
    assert len(row.source) > 20 and "/" in row.source
    assert row.pooling in POOLINGS or (row.pooling is None and (row.not_loaded or row.family in BACKBONES))
    if row.template != known.OWN_TEMPLATE:
        template = known.template_of(row) or PromptTemplate()
        inputs = ["a cat", {"image": IMAGE}, {"image": IMAGE, "text": "a cat", "instruction": "Find it."}]
        assert [template.render(EmbeddingInput.of(value)) for value in inputs] == PROMPTS[row.template]
    if not row.not_loaded:
        assert row.family in transformers.CONFIG_MAPPING or row.family in {*BACKBONES, "phi3_v"}
        assert all(known.find(name) is row for name in row.ids)


def test_the_named_models_are_all_there():
    names = " ".join(name for row in ROWS.values() for name in row.ids).lower()
    wanted = ["vlm2vec-full", "vlm2vec-lora", "vlm2vec-v2.0", "llava-next", "qwen2vl-7b", "gme-qwen2", "lamra", "mme5"]
    for word in [*wanted, "e5-v", "unime", "bge-vl", "b3_qwen2", "qwen3-vl-embedding", *CURRENT]:
        assert word in names


def load(folder: Path, **settings) -> Embedder:
    return Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu", **settings)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.family == "qwen2_vl"])
def test_a_copy_of_a_known_qwen2_vl_takes_the_settings_of_its_row(tiny_vlm, name, tmp_path):
    row = ROWS[name]
    embedder = load(tiny_vlm("qwen2_vl"), like=name.upper())
    assert embedder.backbone.pooling == row.pooling
    for key, value in row.options.items():
        assert embedder.backbone.options()[key] == value
    prompt, order = embedder.backbone.prompt(EmbeddingInput.of({"image": IMAGE, "text": "a", "instruction": "b"}))
    assert prompt.count("<|image_pad|>") == 1 and "<|image_1|>" not in prompt and order == [0]
    vectors = embedder.encode(["a", {"image": IMAGE}])
    embedder.save_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(load(tmp_path / "saved").encode(["a", {"image": IMAGE}]), vectors, atol=1e-6)


def test_a_copy_of_e5_v_reads_its_prompt_by_llava(tiny_vlm):
    embedder = load(tiny_vlm("llava"), like="royokong/e5-v")
    expected = LLAMA.format("<image>" + SUMMARY.format("image"))
    assert embedder.backbone.prompt(EmbeddingInput.of({"image": IMAGE})) == (expected, [0])
    plain = load(tiny_vlm("llava"))
    same = plain.encode([{"image": IMAGE, "text": expected.replace("<image>", "<|image_1|>")}])
    np.testing.assert_allclose(embedder.encode([{"image": IMAGE}]), same, atol=1e-6)


def test_a_copy_of_e5_v_on_llava_next_equals_the_prompt_written_out():
    folder = Path(__file__).parents[1] / "golden/llava-next/base"
    told = LLAMA.format("<|image_1|>" + SUMMARY.format("image"))
    same = load(folder).encode([{"image": IMAGE, "text": told}, LLAMA.format("a cat" + SUMMARY.format("sentence"))])
    vectors = load(folder, like="royokong/e5-v").encode([{"image": IMAGE}, "a cat"])
    np.testing.assert_allclose(vectors, same, atol=1e-6)


def test_a_known_clip_takes_its_fusion(tmp_path):
    build_clip(tmp_path)
    assert load(tmp_path, like="BAAI/BGE-VL-base").backbone.options() == {"fusion": "sum"}


def test_what_the_user_says_wins_over_the_row(tiny_vlm):
    embedder = load(tiny_vlm("qwen2_vl"), like="VLM2Vec/VLM2Vec-V2.0", max_pixels=28 * 56)
    assert embedder.backbone.options() == {"positions": "text", "min_pixels": 3136, "max_pixels": 28 * 56}


def test_an_unknown_checkpoint_gets_a_line_that_says_so_and_a_known_one_does_not(tiny_vlm, caplog):
    with caplog.at_level(logging.WARNING):
        load(tiny_vlm("llava"), like="royokong/e5-v")
        assert "not a known embedding model" not in caplog.text
        load(tiny_vlm("llava"))
    assert caplog.text.count("not a known embedding model; using the default template and pooling of its family") == 1


def test_an_id_that_is_not_in_the_table_or_not_computed_here_is_one_clear_line(tiny_vlm):
    with pytest.raises(UserError, match=r"'x/y' is not a known checkpoint\. Known: .*royokong/e5-v"):
        load(tiny_vlm("llava"), like="x/y")
    with pytest.raises(UserError, match=r"vidore/colpali-v1.3: late interaction"):
        Embedder.from_pretrained("vidore/colpali-v1.3")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache; the hub itself is never asked (HF_HUB_OFFLINE)."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, name: str, folder: Path, commit: str = "a" * 40) -> None:
    """As after a download: the cache's own layout."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)


@pytest.mark.parametrize("ours", [True, False])
def test_a_hub_id_that_says_how_its_vectors_are_made_is_followed(tiny_vlm, tmp_path, hub_cache, ours):
    saved = load(tiny_vlm("llava"))
    saved.backbone.pooling = "mean"
    saved.save_pretrained(tmp_path / "saved")
    if not ours:  # a sentence-transformers folder only
        (tmp_path / "saved/embedder.json").unlink()
    put(hub_cache, "someone/model", tmp_path / "saved")
    value = {"image": IMAGE, "text": "a"}
    by_id = Embedder.from_pretrained("someone/model", dtype=torch.float32, device="cpu")
    np.testing.assert_allclose(by_id.encode([value]), saved.encode([value]), atol=1e-6)
    assert by_id.base == (saved.base if ours else "someone/model")
    pinned = Embedder.from_pretrained("someone/model", dtype=torch.float32, device="cpu", revision="a" * 40)
    np.testing.assert_allclose(pinned.encode([value]), saved.encode([value]), atol=1e-6)


def test_a_hub_id_that_is_not_there_is_one_clear_line(hub_cache):
    with pytest.raises(UserError, match="nobody/nothing: not a folder") as caught:
        Embedder.from_pretrained("nobody/nothing")
    assert "\n" not in str(caught.value)
