"""EmbeddingGemma 2 without its audio part, tiny and random."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from tiny.parts import TEXT, VISION, tokenizer

NAMES = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
WORDS = {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 8, "embedding_dim": 24}
WINDOW = {"sliding_window": 8, "sliding_window_pattern": 2}
HEADS = {"num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16, "use_clipped_linears": False}
PATCHES = {"patch_size": 16, "pooling_kernel_size": 3}


def build_embedding_gemma2(folder: Path) -> None:
    """Writes weights, tokenizer and image settings."""
    ids = tokenizer(folder, list(NAMES.values()), **NAMES)
    transformers.Gemma4ImageProcessorPil(max_soft_tokens=70, **PATCHES).save_pretrained(folder)
    text = {name: value for name, value in TEXT.items() if name != "max_position_embeddings"}
    config = transformers.EmbeddingGemma2Config(
        text_config={**text, **WORDS, **WINDOW, "vocab_size": ids["vocab_size"]},
        vision_config={
            **{"model_type": "gemma4_vision", "position_embedding_size": 64, "default_output_length": 70},
            **VISION, **HEADS, **PATCHES,
        },
        audio_config=None,
        image_token_id=ids["<|image|>"],
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
        video_token_id=ids["vocab_size"] + 1,
        audio_token_id=ids["vocab_size"] + 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
