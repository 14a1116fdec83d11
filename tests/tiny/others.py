"""Tiny random models of other families."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from tiny.parts import (
    TEXT,
    VISION,
    WIDTH,
    Family,
    one_by_one,
    packed,
    processor_config,
    tokenizer,
    tokens_alone,
    weights,
)

SIDES = {"height": 28, "width": 28}
FRAMED = "<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>"


def build_idefics3(folder: Path) -> None:
    build_idefics(folder, "Idefics3", split=False)


def build_smolvlm(folder: Path) -> None:
    build_idefics(folder, "SmolVLM", split=True)


def build_idefics(folder: Path, name: str, split: bool) -> None:
    cells = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    own = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    ids = tokenizer(folder, [*own, *cells, "<video>"])
    tile, edge = {"longest_edge": 28}, {"longest_edge": 56 if split else 28}
    images: Any = getattr(transformers, f"{name}ImageProcessorPil")
    images(size=edge, max_image_size=tile, do_image_splitting=split).save_pretrained(folder)
    processor_config(folder, processor_class=f"{name}Processor", image_seq_len=4)
    config: Any = getattr(transformers, f"{name}Config")
    about = config(
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=ids["vocab_size"]),
        vision_config={**VISION, "image_size": 28, "patch_size": 7},
        image_token_id=ids["<image>"],
        scale_factor=2,
        pad_token_id=0,
    )
    weights(folder, about)


def build_internvl(folder: Path) -> None:
    ids = tokenizer(
        folder,
        ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    transformers.GotOcr2ImageProcessorPil(size=SIDES, max_patches=4).save_pretrained(folder)
    processor_config(folder, processor_class="InternVLProcessor", image_seq_length=4)
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT, vocab_size=ids["vocab_size"]),
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
    )
    weights(folder, config)


def build_paligemma(folder: Path) -> None:
    ids = tokenizer(folder, ["<image>"], image_token="<image>")
    transformers.SiglipImageProcessorPil(size=SIDES, image_seq_length=16).save_pretrained(folder)
    processor_config(folder, processor_class="PaliGemmaProcessor")
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**TEXT, vocab_size=ids["vocab_size"] + 1200, head_dim=16),
        vision_config=transformers.SiglipVisionConfig(
            **VISION, image_size=28, patch_size=7, vision_use_head=False, projection_dim=WIDTH
        ),
        image_token_index=ids["<image>"],
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    weights(folder, config)


def build_gemma3(folder: Path) -> None:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    ids = tokenizer(folder, list(named.values()), **named)
    transformers.Gemma3ImageProcessorPil(size=SIDES, do_pan_and_scan=False).save_pretrained(folder)
    processor_config(folder, processor_class="Gemma3Processor", image_seq_length=4)
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    config = transformers.Gemma3Config(
        text_config={**TEXT, **layers, "vocab_size": ids["vocab_size"], "head_dim": 16, "query_pre_attn_scalar": 16},
        vision_config={**VISION, "image_size": 28, "patch_size": 7, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )
    weights(folder, config)


def build_aya_vision(folder: Path) -> None:
    own = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL"]
    ids = tokenizer(folder, own)
    transformers.GotOcr2ImageProcessorPil(size=SIDES, max_patches=4).save_pretrained(folder)
    processor_config(folder, processor_class="AyaVisionProcessor", patch_size=7, img_size=28, downsample_factor=2)
    config = transformers.AyaVisionConfig(
        text_config=transformers.Cohere2Config(**TEXT, vocab_size=ids["vocab_size"], sliding_window=64),
        vision_config={**VISION, "image_size": 28, "patch_size": 7, "vision_use_head": False},
        image_token_index=ids["<|IMG_PATCH|>"],
        adapter_layer_norm_eps=1e-6,
    )
    weights(folder, config)


def aya_tiles(output: Any, count: int) -> str:
    tiles = "".join(f"TILE_{i}" + "<|IMG_PATCH|>" * 4 for i in range(1, len(output["pixel_values"])))
    return f"<|START_OF_IMG|>{tiles}TILE_GLOBAL" + "<|IMG_PATCH|>" * 4 + "<|END_OF_IMG|>"


def build_mllama(folder: Path) -> None:
    ids = tokenizer(folder, ["<|python_tag|>", "<|image|>"], image_token="<|image|>")
    transformers.MllamaImageProcessorPil(size=SIDES, max_image_tiles=4).save_pretrained(folder)
    processor_config(folder, processor_class="MllamaProcessor")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.MllamaConfig(
        text_config={
            **TEXT,
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "vocab_size": ids["vocab_size"],
            "bos_token_id": 1,
            "rope_parameters": rope,
        },
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 2 * WIDTH,
            "intermediate_layers_indices": [0],
            "image_size": 28,
            "patch_size": 7,
            "max_num_tiles": 4,
        },
        image_token_index=ids["<|image|>"],
    )
    weights(folder, config)


def build_mistral3(folder: Path) -> None:
    ids = tokenizer(folder, ["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    transformers.PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size=7).save_pretrained(folder)
    processor_config(folder, processor_class="PixtralProcessor", patch_size=7, spatial_merge_size=2)
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT, vocab_size=ids["vocab_size"], head_dim=16),
        vision_config=transformers.PixtralVisionConfig(**VISION, image_size=56, patch_size=7),
        image_token_index=ids["[IMG]"],
    )
    weights(folder, config)


def rows_of_tiles(output: Any, count: int) -> str:
    """Tiles by row and column, then the whole."""
    down, across = int(output["rows"][0][0]), int(output["cols"][0][0])
    seen = "<image>" * 4
    cells = [
        [f"<fake_token_around_image><row_{i}_col_{j}>{seen}" for j in range(1, across + 1)] for i in range(1, down + 1)
    ]
    return "".join("".join(row) + "\n" for row in cells) + ("\n" if cells else "") + FRAMED


def rows_of_patches(output: Any, count: int) -> str:
    height, width = (int(side) // 14 for side in output["image_sizes"][0])
    return "[IMG_BREAK]".join(["[IMG]" * width] * height) + "[IMG_END]"


def prefix(prompt: str, tokenizer: Any, outputs: list[Any]) -> dict[str, torch.Tensor]:
    """After the images the begin token, at the end a newline; all of it is read in both directions."""
    cut = prompt.rfind("<image>") + len("<image>") if outputs else 0
    words = tokens_alone(f"{prompt[:cut]}<end>{prompt[cut:]}\n", tokenizer, outputs)
    return {**words, "token_type_ids": torch.zeros_like(words["input_ids"])}


def image_types(prompt: str, tokenizer: Any, outputs: list[Any]) -> dict[str, torch.Tensor]:
    """Tokens of an image see each other in both directions."""
    words = tokens_alone(prompt, tokenizer, outputs)
    soft = tokenizer.convert_tokens_to_ids("<image_soft_token>")
    return {**words, "token_type_ids": (words["input_ids"] == soft).long()}


def seen_from(prompt: str, tokenizer: Any, outputs: list[Any]) -> dict[str, torch.Tensor]:
    """The begin token after the images in front; each token sees the last image before it."""
    rest = prompt
    while rest.startswith("<|image|>"):
        rest = rest.removeprefix("<|image|>")
    words = tokens_alone(f"{prompt[: len(prompt) - len(rest)]}<end>{rest}", tokenizer, outputs)
    ids = words["input_ids"][0]
    places = [*(ids == tokenizer.convert_tokens_to_ids("<|image|>")).nonzero().flatten().tolist(), len(ids)]
    mask = torch.zeros(1, len(ids), len(outputs), 4, dtype=torch.long)
    for k, output in enumerate(outputs):
        mask[0, places[k] : places[k + 1], k, : output["num_tiles"][0][0]] = 1
    return {**words, "cross_attention_mask": mask} if outputs else words


def without_counts(outputs: list[Any]) -> dict[str, torch.Tensor]:
    return packed([{name: value for name, value in output.items() if name != "num_tiles"} for output in outputs], 1)


FAMILIES = {
    "idefics3": Family(build_idefics3, lambda output, count: FRAMED, tensors=partial(packed, dim=1)),
    "smolvlm": Family(
        build_smolvlm, rows_of_tiles, partial(one_by_one, return_row_col_info=True), partial(packed, dim=1)
    ),
    "internvl": Family(
        build_internvl,
        lambda output, count: "<img>" + "<IMG_CONTEXT>" * 4 * len(output["pixel_values"]) + "</img>",
        partial(one_by_one, crop_to_patches=True),
    ),
    "aya_vision": Family(build_aya_vision, aya_tiles, partial(one_by_one, crop_to_patches=True)),
    "gemma3": Family(
        build_gemma3,
        lambda output, count: "\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n",
        words=image_types,
    ),
    "paligemma": Family(build_paligemma, lambda output, count: "<image>" * 16, words=prefix),
    "mllama": Family(build_mllama, lambda output, count: "<|image|>", tensors=without_counts, words=seen_from),
    "mistral3": Family(build_mistral3, rows_of_patches, partial(one_by_one, patch_size=14)),
}
