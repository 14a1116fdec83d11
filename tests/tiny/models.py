"""Tiny random vision-language models in the folder layout of real ones, built offline in about a second each.

Each family also says how its processor writes an image into the prompt (`written_out`), so that tests can put a
prompt together by hand and compare.
"""

from __future__ import annotations

from tiny import llava, others, qwen
from tiny.parts import TEXT, VISION, WIDTH, Family, draw_image, tokenizer

__all__ = ["FAMILIES", "TEXT", "VISION", "WIDTH", "Family", "draw_image", "tokenizer"]

FAMILIES: dict[str, Family] = {**qwen.FAMILIES, **llava.FAMILIES, **others.FAMILIES}
