"""Switches for the peculiarities of the published data and of the reference evaluation.

The defaults reproduce the published scores. docs/guides/mmeb.md lists what is fixed instead of reproduced, with the
test of each item.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from vlm2vec.media.pixels import PixelRules

Side = Literal["image", "frame", "page"]


class Quirks(BaseModel):
    """Controls how rows are converted to inputs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: Literal["published", "content"] = "published"
    """Identity of candidates in the later layout. "published": by image in text-to-image sets (several captions of the
    same image collapse to the first), by image and caption in image-to-image and grounding sets, by text in other sets.
    "content": by the complete model input."""

    duplicates: Literal["published", "merged"] = "published"
    """Candidates with equal content and different ids (blank pages, a text listed twice). "published": each takes its
    own place in the ranking. "merged": they count as one candidate."""

    whitespace: Literal["published", "plain"] = "published"
    """Prompts of video and document tasks and of the image layout with separate instructions. "published": the
    reference loaders' exact bytes. "plain": instruction and text go to the model's own template, which may write the
    instruction as the system turn."""

    candidate_instruction: Literal["published", "none"] = "published"
    """Instructions of candidates, such as "Understand the content of the provided video." "published": candidates have
    them. "none": candidates are encoded as the model's own template writes them without an instruction. Rows of the
    first image layout hold instruction and text in one field and are not changed."""

    missing_image: Literal["published", "removed"] = "published"
    """Image token of a query without an image (WebQA, EDIS). "published": keep the token in the prompt. "removed":
    remove it."""

    pixels: Literal["published", "library"] = "published"
    """Decoding and resizing of images before the model's processor. "published": ignore the EXIF orientation, drop
    alpha, clip 16-bit grey, resize images with a side below 28 pixels or an aspect ratio above 200 to a square, and
    compress VisRAG pages named .jpg as JPEG. "library": apply the EXIF orientation, composite alpha onto white, scale
    16-bit grey, and keep the aspect ratio."""

    squash: int | None = Field(default=None, ge=1)
    """Resize the images of image and document tasks to a square with this side in pixels; 1344 for version 1 models on
    mmeb-v2, as published. None: keep the aspect ratio."""

    frames: int = Field(default=8, ge=1)
    """Number of frames per video, evenly spaced among the published frames (up to 64 per video)."""

    video_pixels: int | None = Field(default=None, ge=1)
    """Maximum number of pixels of all frames of a video together, such as 7864320. None: only the limit of the
    processor applies."""

    def rules(self, side: Side, name: str = "", frames: int = 1) -> PixelRules | None:
        """Returns the preprocessing rules for a kind of image; None: the library's default preprocessing.

        Args:
            side: Kind of image: image of an image task, video frame, or document page.
            name: File name of a document page.
            frames: Number of frames of the video.
        """
        published = self.pixels == "published"
        rules = PixelRules(
            plain=published,
            jpeg=published and side == "page" and name.lower().endswith((".jpg", ".jpeg")),
            squash=None if side == "frame" else self.squash,
            small_images=published and side != "frame",
            small_frames=published and side == "frame",
            max_pixels=self.video_pixels // frames if side == "frame" and self.video_pixels else None,
        )
        return None if rules == PixelRules() else rules
