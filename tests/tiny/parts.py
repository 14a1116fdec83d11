"""Components of the tiny models: tokenizer, random weights, images, and the description of a family."""

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


def tokens_alone(prompt: str, tokenizer: Any, outputs: list[Any]) -> dict[str, torch.Tensor]:
    """Token ids and a mask of ones."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def one_by_one(processor: Any, images: list[Any], **settings: Any) -> list[Any]:
    """What the image processor makes of each image, with the settings that the family's processor passes to it."""
    return [processor(image, return_tensors="pt", **settings) for image in images]


def packed(outputs: list[Any], dim: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of several images one after another, along `dim`; the others are filled up with zeros."""
    tensors = {}
    for name in outputs[0] if outputs else ():
        parts = [torch.as_tensor(output[name]) for output in outputs]
        full = torch.tensor([part.shape for part in parts]).amax(dim=0).tolist()
        for i, part in enumerate(parts):
            blank = part.new_zeros([*full[:dim], part.shape[dim], *full[dim + 1 :]] if part.ndim else [])
            blank[tuple(slice(0, size) for size in part.shape)] = part
            parts[i] = blank
        tensors[name] = torch.cat(parts, dim=dim)
    return tensors


@dataclass(frozen=True)
class Family:
    """A tiny model: how to build it, and its inputs by hand.

    Attributes:
        build: Writes the folder.
        written_out: From the image processor's output (batch of one image) and the number of images in the prompt
            to the text that stands for it.
        see: From the image processor and the images of a prompt to an output an image.
        tensors: From the outputs of the images of one prompt to what the model is given.
        words: From a prompt by hand, the tokenizer and these outputs to the tensors beside the images'.
    """

    build: Callable[[Path], None]
    written_out: Callable[[Any, int], str]
    see: Callable[[Any, list[Any]], list[Any]] = one_by_one
    tensors: Callable[[list[Any]], dict[str, torch.Tensor]] = packed
    words: Callable[[str, Any, list[Any]], dict[str, torch.Tensor]] = tokens_alone


def draw_image(width: int, height: int, seed: int) -> Image.Image:
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
        for name, parameter in model.named_parameters():
            if name.endswith("gate") and parameter.numel() == 1:  # closed when a model is made
                parameter.fill_(1.0)
    model.save_pretrained(folder)


def processor_config(folder: Path, **content: Any) -> None:
    (folder / "processor_config.json").write_text(json.dumps(content))
