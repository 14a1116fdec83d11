"""Tiny random models of the Qwen-VL line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tiny.parts import TEXT, WIDTH, Family, tokenizer, weights

TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WINDOWS = {"depth": 2, "hidden_size": WIDTH, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": WIDTH}
DEEP = {**WINDOWS, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 16,
}


def build(folder: Path, family: str, text: dict[str, Any], vision: dict[str, Any], patch: int = 14) -> None:
    ids = tokenizer(folder, TOKENS)
    images = transformers.Qwen2VLImageProcessorPil(min_pixels=4 * patch**2, max_pixels=64 * patch**2, patch_size=patch)
    images.save_pretrained(folder)
    words = {name: value for name, value in TEXT.items() if name not in text.get("without", ())}
    words |= {name: value for name, value in text.items() if name != "without"}
    config = transformers.CONFIG_MAPPING[family](
        text_config={
            **words,
            "vocab_size": ids["vocab_size"],
            "rope_parameters": ROPE | text.get("rope_parameters", {}),
        },
        vision_config={**vision, "patch_size": patch},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    weights(folder, config)


def build_qwen2_vl(folder: Path) -> None:
    build(
        folder, "qwen2_vl", {}, {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    )


def build_qwen2_5_vl(folder: Path) -> None:
    build(folder, "qwen2_5_vl", {}, {**WINDOWS, "window_size": 56, "fullatt_block_indexes": [1]})


def build_qwen3_vl(folder: Path) -> None:
    build(folder, "qwen3_vl", {"head_dim": 16}, DEEP, 16)


def build_qwen3_5(folder: Path) -> None:
    build(folder, "qwen3_5", LINEAR | {"rope_parameters": {"partial_rotary_factor": 1.0}}, DEEP, 16)


def build_qwen4_exp(folder: Path) -> None:
    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2}
    kinds = {"layer_types": ["linear_attention", "indexed_attention"], "num_experts": 4, "hc_count": 2, "hc_lowrank": 8}
    index = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
    index |= {"indexer_budget": 4096, "indexer_compress_ratio": 4}
    text = LINEAR | experts | kinds | index | {"rope_parameters": {"partial_rotary_factor": 1.0}}
    build(folder, "qwen4_exp", text, DEEP, 16)


def written_out(output: Any, count: int) -> str:
    return "<|image_pad|>" * int(output["image_grid_thw"].prod() // 4)


def text_positions(prompt: str, tokenizer: Any, outputs: list[Any]) -> dict[str, torch.Tensor]:
    """These prompts hold no vision-start: images have the positions of text."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


BUILDERS = [build_qwen2_vl, build_qwen2_5_vl, build_qwen3_vl, build_qwen3_5, build_qwen4_exp]
FAMILIES = {
    built.__name__.removeprefix("build_"): Family(built, written_out, words=text_positions) for built in BUILDERS
}
