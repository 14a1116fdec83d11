"""Explicitly built video patches of the Qwen-VL line, and a plain forward pass of the Hugging Face class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from tiny.qwen import TOKENS


def patches_by_hand(folder: Path, frames: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Of frames that need no resizing: two after another lie in a patch, and patches that are merged lie together."""
    about = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    mean, std = (np.array(values)[:, None, None] for values in (about.image_mean, about.image_std))
    pixels = np.stack([(np.asarray(frame).transpose(2, 0, 1) / 255 - mean) / std for frame in frames])
    side, (_, _, height, width) = about.patch_size, pixels.shape
    down, across = height // side, width // side
    rows = []
    for step in range(0, len(frames), 2):
        for top in range(0, down, 2):
            for left in range(0, across, 2):
                for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                    patch = pixels[step : step + 2, :, y * side : (y + 1) * side, x * side : (x + 1) * side]
                    rows.append(patch.transpose(1, 0, 2, 3).ravel())
    grid = torch.tensor([[len(frames) // 2, down, across]])
    return torch.tensor(np.array(rows), dtype=torch.float32), grid


@torch.inference_mode()
def forward_by_hand(folder: Path, prompt: str, **tensors: torch.Tensor) -> np.ndarray:
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")["input_ids"]
    kinds = 2 * (ids == 2 + TOKENS.index("<|video_pad|>")) if "video_grid_thw" in tensors else None
    more = {} if kinds is None else {"mm_token_type_ids": kinds.long()}
    vector = model(input_ids=ids, attention_mask=torch.ones_like(ids), **tensors, **more).last_hidden_state[:, -1]
    return torch.nn.functional.normalize(vector, dim=-1).numpy()
