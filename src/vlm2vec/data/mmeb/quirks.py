"""Oddities of the published data and of the evaluator that published scores come from, each a named switch.

The default is what published scores used. What is fixed instead of reproduced is listed in
docs/guides/mmeb.md, with the test
that states it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Quirks(BaseModel):
    """How rows become inputs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: Literal["published", "content"] = "published"
    """What makes two candidates one. "published": text to image sets by image (so captions beside the same image
    collapse to the first), image to image and grounding sets by image and caption, others by text. "content": by
    everything that the model sees."""

    whitespace: Literal["published", "plain"] = "published"
    """Prompts of the layout with separate instructions. "published": the reference loaders' exact bytes, which were
    made to equal the first layout's. "plain": instruction and text go to the model's own template."""

    frames: int = Field(default=8, ge=1)
    """Frames of a video, at equal distances among those that were published (up to 64 a video)."""
