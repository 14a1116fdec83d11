"""Prepares a folder for vLLM and SGLang: weights named as in a generative model, a chat template, start commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from vlm2vec.errors import UserError
from vlm2vec.files import read_json, write_json, write_text
from vlm2vec.models.backbones.generic import Generic
from vlm2vec.models.checkpoints.card import write_card
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.st_folder import chat_template

VLLM_FILE, SGLANG_FILE, SERVED_CHAT_FILE = "serve_vllm.sh", "serve_sglang.sh", "served_chat_template.jinja"
INDEX_FILE = "model.safetensors.index.json"
POOLINGS = {"last": "LAST", "mean": "MEAN", "cls": "CLS"}
"""Poolings of vLLM's pooling runner, by our names."""
INSTEAD = "serve it with vlm2vec serve"


def check_served(embedder: Embedder) -> None:
    """Checks that vLLM can compute the vectors of a model.

    Raises:
        UserError: for a family without a generative class in transformers; for a pooling, a head or an attention mask
            that vLLM lacks; and for a model that gives the tokens of an image the positions of text.
    """
    backbone = embedder.backbone
    if not isinstance(backbone, Generic) or _generative(embedder) is None:
        raise UserError(f"{backbone.name}: --to vllm takes families of transformers that generate text; {INSTEAD}")
    if backbone.pooling not in POOLINGS:
        raise UserError(f"pooling {backbone.pooling}: vLLM has {', '.join(POOLINGS)}; {INSTEAD}")
    if len(embedder.head) or embedder.truncate_dim or "final_norm" in backbone.settings:
        raise UserError(f"vLLM computes neither Dense layers nor truncate_dim nor final_norm=false; {INSTEAD}")
    if backbone.attention != "causal":
        raise UserError(f"attention {backbone.attention}: vLLM computes causal attention for this family; {INSTEAD}")
    if not _has_image_positions(backbone):
        raise UserError(
            "this model gives image tokens the positions of text, because its prompts have no token before an image, "
            f"and vLLM gives them image positions; {INSTEAD}, or train with model.options.positions=multimodal"
        )


def write_served(embedder: Embedder, folder: Path, name: str) -> None:
    """Turns a merged folder into one that vLLM and SGLang load; vlm2vec and transformers still load it.

    Args:
        embedder: The model, checked by `check_served`.
        folder: A folder with merged weights; names of tensors and the architecture are changed to those of the
            generative class, since vLLM does not load the base class.
        name: Name of the folder in the commands, and of the model on the server.
    """
    backbone: Any = embedder.backbone
    family: Any = _generative(embedder)
    weights = sorted(folder.glob("model*.safetensors"))
    named = {path.name: _rename(path, f"{family.base_model_prefix}.") for path in weights}
    # Without an index, vLLM reads every safetensors file of the folder as weights, the golden vectors too.
    places = {name: file for file, names in named.items() for name in names}
    size = sum(path.stat().st_size for path in weights)
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": places})
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "architectures": [family.__name__]})
    processor = read_json(folder / "processor_config.json")
    if "video_processor" not in processor:  # saved without torchvision; servers fall back to the older file
        write_json(folder / "preprocessor_config.json", processor["image_processor"])
    before, after = special_tokens(backbone.tokenizer)
    chat = chat_template(backbone.template, backbone.image_token)
    write_text(folder / SERVED_CHAT_FILE, _literal(before) + chat + _literal(after))
    for file, words in ((VLLM_FILE, vllm_command(embedder, name)), (SGLANG_FILE, sglang_command(name))):
        write_text(folder / file, f'#!/bin/sh\n# Run beside the folder {name}.\nexec {shlex.join(words)} "$@"\n')
    write_card(folder)


def vllm_command(embedder: Embedder, name: str) -> list[str]:
    """The command that serves the folder with vLLM, with the model's pooling and up to eight images for an input."""
    pooler = json.dumps({"pooling_type": POOLINGS[embedder.backbone.pooling], "use_activation": True})
    words = ["vllm", "serve", name, "--runner", "pooling", "--convert", "embed", "--pooler-config", pooler]
    words += ["--chat-template", f"{name}/{SERVED_CHAT_FILE}", "--chat-template-content-format", "openai"]
    return [*words, "--limit-mm-per-prompt", '{"image": 8}']


def sglang_command(name: str) -> list[str]:
    """The command that serves the folder with SGLang, which pools the last token and normalizes."""
    words = ["python", "-m", "sglang.launch_server", "--model-path", name, "--is-embedding", "--enable-multimodal"]
    return [*words, "--chat-template", f"{name}/{SERVED_CHAT_FILE}"]


def special_tokens(tokenizer: Any) -> tuple[str, str]:
    """The special tokens that a tokenizer puts before and after a text. Servers leave them out of rendered chats."""
    plain: list[int] = tokenizer("x", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("x")["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return str(tokenizer.decode(full[:start])), str(tokenizer.decode(full[start + len(plain) :]))


def _generative(embedder: Embedder) -> Any:
    """The class of transformers that generates text with this model; None if there is none."""
    backbone: Any = embedder.backbone
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(backbone.model.config), None)


def _has_image_positions(backbone: Generic) -> bool:
    """Whether the tokens of an image always have the positions that the family's own code gives them."""
    start = getattr(backbone.config, "vision_start_token_id", None)
    if backbone.rope_index is None or backbone.settings["positions"] == "multimodal" or start is None:
        return True
    written = backbone.template.image + backbone.template.chat
    return backbone.settings["positions"] != "text" and str(backbone.tokenizer.convert_ids_to_tokens(start)) in written


def _literal(text: str) -> str:
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}" if text else ""


def _rename(path: Path, prefix: str) -> list[str]:
    """Puts a prefix before the names of a file's tensors; returns the new names."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {prefix + key: tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata)
    return list(tensors)
