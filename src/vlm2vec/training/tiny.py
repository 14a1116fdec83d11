"""Creates tiny random models of real families for dry runs: the real model's code paths, in seconds and offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from vlm2vec.errors import UserError, shown

WIDTH = 32
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_NAMES = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def write_tiny(family: str, folder: Path) -> None:
    """Writes a tiny model of this family in the layout of a real checkpoint.

    Args:
        family: `model_type` of the HF config.
        folder: An empty folder.

    Raises:
        UserError: for a family that has no tiny model.
    """
    if family not in BUILDERS:
        raise UserError(
            f"model.family {shown(family)}: dry runs of models that are not built in replace the base by a tiny model; "
            f"expected the base's family, one of {', '.join(sorted(BUILDERS))}"
        )
    torch.manual_seed(0)
    config = BUILDERS[family](folder)
    transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)


def _tokenizer(folder: Path, special: list[str]) -> dict[str, int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<pad>", "<end>", *special]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    built: Any = Tokenizer(models.BPE({token: i for i, token in enumerate([*tokens, *letters])}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(tokens)
    names = {"pad_token": tokens[0], "eos_token": tokens[1], "model_input_names": ["input_ids", "attention_mask"]}
    transformers.PreTrainedTokenizerFast(tokenizer_object=built, **names).save_pretrained(folder)
    return {**{token: i for i, token in enumerate(tokens)}, "vocab_size": len(tokens) + len(letters)}


def _qwen_ids(folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
    ids = _tokenizer(folder, QWEN_TOKENS)
    names = {name: ids[token] for name, token in zip(QWEN_NAMES, QWEN_TOKENS, strict=True)}
    return names, {**TEXT, "vocab_size": ids["vocab_size"]}


def _qwen2_vl(folder: Path) -> Any:
    ids, text = _qwen_ids(folder)
    transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=112 * 112).save_pretrained(folder)
    vision = {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    return transformers.Qwen2VLConfig(text_config={**text, "rope_parameters": ROPE}, vision_config=vision, **ids)


def _qwen3_vl(folder: Path) -> Any:
    ids, text = _qwen_ids(folder)
    sizes = {"min_pixels": 32 * 32, "max_pixels": 128 * 128, "patch_size": 16}
    transformers.Qwen2VLImageProcessorPil(**sizes).save_pretrained(folder)
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    text |= {"head_dim": 16, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)


def _llava_next(folder: Path) -> Any:
    ids = _tokenizer(folder, ["<image>"])
    grid = [[28, 56], [56, 28], [56, 56]]
    sides = {"height": 28, "width": 28}
    transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=sides, image_grid_pinpoints=grid
    ).save_pretrained(folder)
    about = {"processor_class": "LlavaNextProcessor", "patch_size": 7, "num_additional_image_tokens": 1}
    about["vision_feature_select_strategy"] = "default"
    (folder / "processor_config.json").write_text(json.dumps(about))
    tower = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlavaNextConfig(
        text_config=transformers.MistralConfig(**TEXT, vocab_size=ids["vocab_size"]),
        vision_config=transformers.CLIPVisionConfig(**tower, image_size=28, patch_size=7),
        image_token_index=ids["<image>"],
        image_grid_pinpoints=grid,
        image_seq_length=16,
    )


BUILDERS: dict[str, Callable[[Path], Any]] = {
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
}
