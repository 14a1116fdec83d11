"""Tiny random dual encoders in the folder layout of real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tiny.models import TEXT, VISION, WIDTH, tokenizer

SIDES = {"height": 28, "width": 28}
IMAGES = {**VISION, "image_size": 28, "patch_size": 7}
WORDS = {**{k: TEXT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}}


def save(folder: Path, model: Any, images: Any) -> None:
    """Random weights, wide enough that every token and pixel matters."""
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    images.save_pretrained(folder)


def build_clip(folder: Path) -> None:
    ids = tokenizer(folder, [])
    words = {**WORDS, "vocab_size": ids["vocab_size"], "max_position_embeddings": 40, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**words, "bos_token_id": 1, "pad_token_id": 0, "projection_dim": 24},
        vision_config={**IMAGES, "projection_dim": 24},
        projection_dim=24,
    )
    ends_with_end_token(folder)
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIDES)
    save(folder, transformers.CLIPModel(config), images)


def ends_with_end_token(folder: Path) -> None:
    """CLIP pools the end token: the tokenizer must write it."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    end = {"SpecialToken": {"id": "<end>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}, end],
        "special_tokens": {"<end>": {"id": "<end>", "ids": [1], "tokens": ["<end>"]}},
    }
    path.write_text(json.dumps(content))


def build_siglip(folder: Path) -> None:
    ids = tokenizer(folder, [])
    without_mask(folder)
    words = {**WORDS, "vocab_size": ids["vocab_size"], "max_position_embeddings": 24, "pad_token_id": 0}
    config = transformers.SiglipConfig(
        text_config={**words, "projection_size": WIDTH, "bos_token_id": 1, "eos_token_id": 1}, vision_config=IMAGES
    )
    save(folder, transformers.SiglipModel(config), transformers.SiglipImageProcessorPil(size=SIDES))


def build_siglip2(folder: Path) -> None:
    ids = tokenizer(folder, ["<unk>"])
    without_mask(folder)
    words = {**WORDS, "vocab_size": ids["vocab_size"], "max_position_embeddings": 24, "pad_token_id": 0}
    config = transformers.Siglip2Config(
        text_config={**words, "projection_size": WIDTH, "bos_token_id": 1, "eos_token_id": 1},
        vision_config={**VISION, "patch_size": 7, "num_patches": 16},
    )
    images = transformers.Siglip2ImageProcessorPil(patch_size=7, max_num_patches=16)
    save(folder, transformers.Siglip2Model(config), images)


def without_mask(folder: Path) -> None:
    """SigLIP reads padding like text: its tokenizer gives no mask."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_input_names": ["input_ids"]}))


def build_blip(folder: Path) -> None:
    ids = tokenizer(folder, [])
    ends_with_end_token(folder)
    words = {**WORDS, "vocab_size": ids["vocab_size"], "max_position_embeddings": 40, "encoder_hidden_size": WIDTH}
    config = transformers.BlipConfig(
        text_config={**words, "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 1, "sep_token_id": 1},
        vision_config=IMAGES,
        image_text_hidden_size=24,
    )
    images = transformers.BlipImageProcessorPil(size=SIDES)
    save(folder, transformers.BlipForImageTextRetrieval(config), images)


def build_blip2(folder: Path) -> None:
    ids = tokenizer(folder, [])
    ends_with_end_token(folder)
    config = transformers.Blip2Config(
        qformer_config={
            **WORDS,
            "vocab_size": ids["vocab_size"],
            "max_position_embeddings": 40,
            "encoder_hidden_size": WIDTH,
            "use_qformer_text_input": True,
            "pad_token_id": 0,
        },
        vision_config=IMAGES,
        num_query_tokens=3,
        image_text_hidden_size=24,
    )
    images = transformers.BlipImageProcessorPil(size=SIDES)
    save(folder, transformers.Blip2ForImageTextRetrieval(config), images)


DUAL: dict[str, Callable[[Path], None]] = {
    "clip": build_clip,
    "siglip": build_siglip,
    "siglip2": build_siglip2,
    "blip": build_blip,
    "blip-2": build_blip2,
}
