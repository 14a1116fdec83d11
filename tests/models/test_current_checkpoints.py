"""Known checkpoints of 2026 on tiny models of their families, and the switches with which they are evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from data.golden_mmeb import read_golden, write_golden
from tiny.embedding_gemma2 import build_embedding_gemma2
from tiny.models import draw_image
from torch import nn
from typer.testing import CliRunner

from vlm2vec import Embedder, UserError
from vlm2vec.cli import app
from vlm2vec.evaluation.benchmark import read_benchmark
from vlm2vec.models.backbones.final_norm import set_final_norm
from vlm2vec.models.checkpoints import known
from vlm2vec.models.st_folder import OWN_MODULE
from vlm2vec.models.verification.fingerprint import describe
from vlm2vec.types import EmbeddingInput

IMAGE = draw_image(40, 30, 0)
BOTH = {"image": IMAGE, "text": "a cat", "instruction": "Find it."}
CHAT = (
    "{%- for message in messages -%}{{- '<|im_start|>' ~ message.role ~ '\\n' -}}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{- part.text -}}"
    "{%- endif -%}{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant{%- endif -%}"
)


def load(folder: Path, **settings) -> Embedder:
    return Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu", **settings)


def assert_reads(embedder: Embedder, plain: Embedder, prompt: str) -> None:
    """The embedder's prompt and vector of `BOTH` are those of the prompt written out; `{}` is the image."""
    written, order = embedder.backbone.prompt(EmbeddingInput.of(BOTH))
    assert (written, order) == (prompt.format(embedder.backbone.image_token), [0])
    by_hand = plain.encode([{"image": IMAGE, "text": prompt.format("<|image_1|>")}])
    np.testing.assert_allclose(embedder.encode([BOTH]), by_hand, atol=1e-6)


@pytest.mark.parametrize("name", ["tencent/WeMM-Embedding-2B", "ATH-MaaS/Ovis-VL-Embedding-2B"])
def test_a_model_whose_folder_writes_its_prompts(tiny_vlm, tmp_path, name):
    base = tiny_vlm("qwen3_5")
    with pytest.raises(UserError, match="written by the chat template of its folder, which has none"):
        load(base, like=name)
    folder = shutil.copytree(base, tmp_path / "folder")
    (folder / "chat_template.jinja").write_text(CHAT)
    prompt = "<|im_start|>user\n<|vision_start|>{}<|vision_end|>Find it. a cat<|im_end|>\n"
    embedder = load(folder, like=name)
    assert_reads(embedder, load(base), prompt)
    again = load(embedder.save_pretrained(tmp_path / "again"))
    np.testing.assert_allclose(again.encode([BOTH]), embedder.encode([BOTH]), atol=1e-6)


def test_qwen3_vl_embedding(tiny_vlm):
    embedder, plain = (load(tiny_vlm("qwen3_vl"), **more) for more in ({"like": "Qwen/Qwen3-VL-Embedding-8B"}, {}))
    assert embedder.backbone.options()["max_pixels"] == 1843200
    turns = (
        "<|im_start|>system\nFind it.<|im_end|>\n<|im_start|>user\n<|vision_start|>{}<|vision_end|>a cat<|im_end|>\n"
    )
    assert_reads(
        embedder, load(tiny_vlm("qwen3_vl"), min_pixels=4096, max_pixels=1843200), turns + "<|im_start|>assistant\n"
    )
    assert plain.backbone.options()["positions"] == "vision-start"


def test_embeddinggemma_2_equals_a_direct_forward(tmp_path):
    build_embedding_gemma2(tmp_path)
    embedder = load(tmp_path, like="google/embeddinggemma-2")
    images = transformers.Gemma4ImageProcessorPil.from_pretrained(tmp_path)(IMAGE, return_tensors="pt")
    tokens = "<|image|>" * int(images["num_soft_tokens_per_image"][0])
    prompt = f"<|image>{tokens}<image|>task: search result | query: a cat"
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)(prompt, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    pixels = {name: images[name] for name in ("pixel_values", "image_position_ids")}
    with torch.no_grad():
        states = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], **pixels).last_hidden_state
    expected = nn.functional.normalize(states.mean(dim=1), dim=-1).numpy()
    found = embedder.encode_query([{"image": IMAGE, "text": "a cat"}, "a dog", IMAGE])
    assert found.shape == (3, 24) and (found[:1] * expected).sum() >= 0.99999
    again = load(embedder.save_pretrained(tmp_path / "again"))
    np.testing.assert_allclose(again.encode_query(["a dog"]), found[1:2], atol=1e-6)


def test_the_final_norm_can_be_left_out(tiny_vlm, tmp_path):
    folder, scale = tiny_vlm("qwen3_vl"), torch.linspace(0.5, 2, 32)
    after, before = load(folder), load(folder, final_norm=False)
    for embedder in (after, before):
        embedder.backbone.language_model.norm.weight.data.copy_(scale)
    values = ["a cat", {"image": IMAGE}]
    scaled = before.encode(values) * scale.numpy()  # the norm scales each dimension, and each vector
    np.testing.assert_allclose(scaled / np.linalg.norm(scaled, axis=1, keepdims=True), after.encode(values), atol=1e-5)
    assert (before.encode(values) * after.encode(values)).sum(axis=1).max() < 0.999
    assert describe(before, "m")["processor"] != describe(after, "m")["processor"]
    before.save_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(load(tmp_path / "saved").encode(values), before.encode(values), atol=1e-6)
    assert OWN_MODULE in (tmp_path / "saved/modules.json").read_text()
    with pytest.raises(UserError, match="final_norm=false: Linear has no module norm"):
        set_final_norm(nn.Linear(1, 1), False)


def test_switches_of_known_checkpoints_are_switches_of_benchmarks():
    benchmark = read_benchmark("mmeb-v2")[0]
    rows = [row for row in known.table().checkpoints if row.evaluation]
    assert len(rows) >= 2
    for row in rows:
        found = benchmark.with_switches(row.evaluation).quirks.model_dump()
        assert found | row.evaluation == found
    assert known.evaluation_of("compact") == known.evaluation_of("runs/mine") == {}


def test_eval_takes_the_switches_of_a_known_checkpoint_and_the_user_changes_them(tiny_vlm, tmp_path):
    write_golden(read_golden("MSVD"), tmp_path / "data")
    task = {"name": "MSVD", "reader": "video", "meta_task": "video_retrieval", "modality": "video"}
    tasks = [{**task, "metric": "hit@1", "scope": "global"}]
    file = tmp_path / "videos.yaml"
    file.write_text(yaml.safe_dump({"name": "videos", "tasks": tasks, "source": {"eval": "data"}}))
    command = ["eval", str(tiny_vlm("qwen3_vl")), "--benchmark", str(file)]
    command += ["--option", "like=Qwen/Qwen3-VL-Embedding-2B", "--option", "dtype=float32"]
    command += ["-o", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--switch", "frames=4"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    switches = json.loads((tmp_path / "out/results.json").read_text())["about"]["data_switches"]
    for word in ("whitespace plain", "candidate_instruction none", "frames 4", "video_pixels 7864320"):
        assert word in switches


def test_models_that_are_not_computed_say_why():
    for name in ("jinaai/jina-embeddings-v4", "nvidia/llama-nemotron-embed-vl-1b-v2"):
        with pytest.raises(UserError, match=f"{name}: .*code of the checkpoint") as caught:
            known.find(name)
        assert "\n" not in str(caught.value)
