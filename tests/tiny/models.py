"""Tiny random vision-language models in the folder layout of real ones, built offline in about a second each.

Each family also says how its processor writes a picture into the prompt (`written_out`), so that tests can put a
prompt together by hand and compare.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WIDTH = 32
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
VISION = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Family:
    """A tiny model: how to build it, and its prompts by hand.

    Attributes:
        build: Writes the folder.
        written_out: From the image processor's output (batch of one picture) to the text that stands for it.
        picture_settings: What the family's processor passes to its image processor.
    """

    build: Callable[[Path], None]
    written_out: Callable[[Any], str]
    picture_settings: dict[str, Any]


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Coarse random colours: survives resizing, unlike noise by pixel."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def tokenizer(folder: Path, special: list[str], **named: str) -> dict[str, int]:
    """Saves a byte-level tokenizer with these special tokens (after pad and end); returns their ids."""
    tokens = ["<pad>", "<end>", *special]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({token: i for i, token in enumerate([*tokens, *letters])}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(tokens)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        eos_token="<end>",
        bos_token="<end>",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=named,
    )
    wrapped.save_pretrained(folder)
    return {token: i for i, token in enumerate(tokens)} | {"vocab_size": len(tokens) + len(letters)}


def weights(folder: Path, config: Any) -> None:
    """Random weights, wide enough that every token and its place matter in the result."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)


def processor_config(folder: Path, **content: Any) -> None:
    (folder / "processor_config.json").write_text(json.dumps(content))


def build_qwen2_vl(folder: Path) -> None:
    ids = tokenizer(folder, ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=112 * 112).save_pretrained(folder)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "vocab_size": ids["vocab_size"], "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    weights(folder, config)


def build_llava(folder: Path) -> None:
    ids = tokenizer(folder, ["<image>"])
    sides = {"height": 28, "width": 28}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=sides).save_pretrained(folder)
    processor_config(
        folder,
        processor_class="LlavaProcessor",
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=ids["vocab_size"]),
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=28, patch_size=7),
        image_token_index=ids["<image>"],
        image_seq_length=16,
    )
    weights(folder, config)


def build_idefics3(folder: Path) -> None:
    ids = tokenizer(folder, ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"])
    edge = {"longest_edge": 28}
    pictures = transformers.Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    pictures.save_pretrained(folder)
    processor_config(folder, processor_class="Idefics3Processor", image_seq_len=4)
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=ids["vocab_size"]),
        vision_config={**VISION, "image_size": 28, "patch_size": 7},
        image_token_id=ids["<image>"],
        scale_factor=2,
        pad_token_id=0,
    )
    weights(folder, config)


def build_internvl(folder: Path) -> None:
    ids = tokenizer(
        folder,
        ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    sides = {"height": 28, "width": 28}
    transformers.GotOcr2ImageProcessorPil(size=sides, max_patches=4).save_pretrained(folder)
    processor_config(folder, processor_class="InternVLProcessor", image_seq_length=4)
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT, vocab_size=ids["vocab_size"]),
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
    )
    weights(folder, config)


FAMILIES = {
    "qwen2_vl": Family(
        build_qwen2_vl,
        lambda output: "<|image_pad|>" * int(output["image_grid_thw"].prod() // 4),
        {},
    ),
    "llava": Family(build_llava, lambda output: "<image>" * 16, {}),
    "idefics3": Family(
        build_idefics3,
        lambda output: "<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>",
        {},
    ),
    "internvl": Family(
        build_internvl,
        lambda output: "<img>" + "<IMG_CONTEXT>" * 4 * len(output["pixel_values"]) + "</img>",
        {"crop_to_patches": True},
    ),
}
