"""`vlm2vec export --to vllm`: the folder, its chat template and its commands are what vLLM's loader and renderer take.

Comparing vectors needs vLLM itself; docs/guides/serving.md says what was measured with it.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny.models import draw_image
from typer.testing import CliRunner

from vlm2vec import Embedder, UserError
from vlm2vec.cli import app
from vlm2vec.models.transformers_internals import render_chat
from vlm2vec.models.verification.export import export
from vlm2vec.models.verification.vllm_export import SERVED_CHAT_FILE, SGLANG_FILE, VLLM_FILE, special_tokens
from vlm2vec.types import EmbeddingInput

IMAGE = draw_image(40, 30, 1)
INPUTS: list[Any] = ["a dog", {"image": IMAGE}, {"image": IMAGE, "text": "what?"}]
MULTIMODAL = {"positions": "multimodal"}


@pytest.fixture(scope="module")
def served(tiny_vlm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "served"
    export(str(tiny_vlm("qwen2_vl")), "vllm", folder, **MULTIMODAL)
    return folder


def words_of(folder: Path, file: str) -> list[str]:
    command = (folder / file).read_text().splitlines()[-1]
    return shlex.split(command.removeprefix("exec ").removesuffix(' "$@"'))


def test_weights_and_architecture_are_those_of_the_generative_class(served: Path, tiny_vlm) -> None:
    config = json.loads((served / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    with safe_open(served / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert all(name.startswith(("model.language_model.", "model.visual.")) for name in names)
    index = json.loads((served / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == dict.fromkeys(names, "model.safetensors")  # vLLM would read golden.safetensors without it
    again = Embedder.from_pretrained(served, dtype=torch.float32, device="cpu")
    source = Embedder.from_pretrained(tiny_vlm("qwen2_vl"), dtype=torch.float32, device="cpu", **MULTIMODAL)
    np.testing.assert_allclose(again.encode(INPUTS), source.encode(INPUTS), atol=1e-5)


def test_the_commands_name_the_folder_its_template_and_the_pooling(served: Path) -> None:
    words = words_of(served, VLLM_FILE)
    assert words[:3] == ["vllm", "serve", "served"] and words[words.index("--runner") + 1] == "pooling"
    assert json.loads(words[words.index("--pooler-config") + 1]) == {"pooling_type": "LAST", "use_activation": True}
    for file in (VLLM_FILE, SGLANG_FILE):
        words = words_of(served, file)
        assert (served.parent / words[words.index("--chat-template") + 1]).is_file()


def test_the_card_has_the_command_of_the_server(served: Path) -> None:
    command = " ".join((served / VLLM_FILE).read_text().splitlines()[-1].split()[1:-1])
    assert command in (served / "README.md").read_text() and command.startswith("vllm serve")


def test_the_chat_template_writes_the_prompt_with_the_special_tokens_of_the_tokenizer(served: Path) -> None:
    backbone: Any = Embedder.from_pretrained(served, dtype=torch.float32, device="cpu").backbone
    template = (served / SERVED_CHAT_FILE).read_text()
    item = EmbeddingInput.of({"image": IMAGE, "text": "what?", "instruction": "Find it."})
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Find it."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    ]
    before, after = special_tokens(backbone.tokenizer)
    assert render_chat(messages, template, {}) == before + backbone.prompt(item)[0] + after


def test_special_tokens_are_found_before_and_after_a_text(tiny_vlm) -> None:
    from tokenizers.processors import TemplateProcessing

    backbone: Any = Embedder.from_pretrained(tiny_vlm("llava"), dtype=torch.float32, device="cpu").backbone
    tokenizer = backbone.tokenizer
    first, last = (tokenizer.convert_ids_to_tokens(i) for i in (tokenizer.all_special_ids * 2)[:2])
    pairs = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (first, last)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{first} $A {last}", special_tokens=pairs)
    assert special_tokens(tokenizer) == (first, last)


def test_what_vllm_cannot_compute_is_refused_in_one_line(tiny_vlm, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="positions of text"):
        export(str(tiny_vlm("qwen2_vl")), "vllm", tmp_path / "text-positions", positions="text")
    with pytest.raises(UserError, match="compact: --to vllm takes families of transformers"):
        export("compact", "vllm", tmp_path / "compact", num_layers=1, visual_tokens=4, image_size=64)
    assert not list(tmp_path.iterdir())


def test_the_command_line_prints_how_to_start_the_servers(tiny_vlm, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(tiny_vlm("llava")), "--to", "vllm", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert VLLM_FILE in done.stdout and SGLANG_FILE in done.stdout and "cosine" in done.stdout
