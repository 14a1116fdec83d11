"""Switches for the oddities of the published data and of the reference evaluation that published scores come from.

The default is what published scores used. docs/guides/mmeb.md lists what is fixed instead of reproduced, and the test
of each.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from vlm2vec.media.pixels import PixelRules

Side = Literal["image", "frame", "page"]


class Quirks(BaseModel):
    """How rows become inputs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: Literal["published", "content"] = "published"
    """What makes two candidates one, in the later layout. "published": text to image sets by image (so captions beside
    the same image collapse to the first), image to image and grounding sets by image and caption, others by text.
    "content": by everything that the model sees."""

    duplicates: Literal["published", "merged"] = "published"
    """Candidates with equal content under two names (blank pages, a text listed twice). "published": each takes a place
    in the ranking. "merged": they are one candidate."""

    whitespace: Literal["published", "plain"] = "published"
    """Prompts of the layout with separate instructions. "published": the reference loaders' exact bytes, which were
    made to equal the first layout's. "plain": instruction and text go to the model's own template."""

    missing_image: Literal["published", "removed"] = "published"
    """The image token of a query that has no image (WebQA, EDIS). "published": the model reads the token. "removed":
    it does not."""

    pixels: Literal["published", "library"] = "published"
    """How images are decoded and resized before the model's processor reads them. "published": EXIF orientation
    ignored, alpha dropped, 16-bit grey clipped, a side below 28 pixels or an aspect ratio above 200 resized to a
    square, VisRAG pages with names in .jpg compressed as JPEG. "library": upright, on white, scaled, and of their own
    shape."""

    squash: int | None = Field(default=None, ge=1)
    """Resize the images of image tasks and documents to a square of this side first; 1344 for version 1 models on
    mmeb-v2, as published. None: keep the shape."""

    frames: int = Field(default=8, ge=1)
    """Frames of a video, at equal distances among those that were published (up to 64 a video)."""

    video_pixels: int | None = Field(default=None, ge=1)
    """Most pixels of all frames of a video together, such as 7864320. None: no limit but the processor's."""

    def rules(self, side: Side, name: str = "", frames: int = 1) -> PixelRules | None:
        """How the images of one kind are prepared; None: as the library does.

        Args:
            side: An image of an image task, a video frame, or a document page.
            name: Of a page.
            frames: Of the video.
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
