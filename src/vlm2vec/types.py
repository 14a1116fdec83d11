"""The values that modules exchange. No file is opened here.

Shapes: B examples, M targets, L tokens, D embedding dim.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vlm2vec.errors import UserError
from vlm2vec.media.documents import VIDEO_ENDINGS
from vlm2vec.media.images import ImageRef
from vlm2vec.media.videos import VideoRef

if TYPE_CHECKING:
    import numpy as np

    from vlm2vec.batch import Batch

BARE_IMAGE_TOKEN = "<|image_pad|>"  # noqa: S105
"""In the text of an input without images: the model reads its own image token there, with no image behind it."""


@dataclass(frozen=True, slots=True)
class EmbeddingInput:
    """One input, of which one vector is made: text, images, a video or several of them, with an optional instruction.

    Attributes:
        text: Free text. If it contains the canonical placeholder `<|image_1|>`, it is the whole prompt, verbatim.
        images: Images in the order of their placeholders, not decoded yet.
        instruction: What the vector is for. Ignored if `text` contains a placeholder (it is then part of the text).
        video: A video, not decoded yet. It comes before the images, or at `<|video_1|>` in `text`.
        text_first: Whether the text was given before the images and the video. Only templates that keep the order of
            their input use it (folders written by sentence-transformers); all others put the text last.
    """

    text: str | None = None
    images: tuple[ImageRef, ...] = ()
    instruction: str | None = None
    video: VideoRef | None = None
    text_first: bool = False

    def __post_init__(self) -> None:
        """Checks the types, so that a missing or numeric text of a table is an error of its own input.

        Raises:
            UserError: naming the field and what it holds.
        """
        for name in ("text", "instruction"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise UserError(f"input: {name} is {_shown(value)}; expected a string, or None for no {name}")
        for image in self.images:
            if not isinstance(image, ImageRef):
                raise UserError(f"input: images has {_shown(image)}; expected ImageRef, which EmbeddingInput.of makes")

    @staticmethod
    def of(value: Any, instruction: str | None = None) -> EmbeddingInput:
        """Makes an input from a string, a path to an image or video, a PIL image, or a dict.

        A `str` is text. A PIL image or a `pathlib.Path` is an image, or a video if the path has a video's suffix. A
        dict has any of `text`, `image` / `images`, `video` (a file, a folder of frames or a list of images) and
        `instruction`; the order of its keys says whether the text comes first.

        Raises:
            UserError: for an unknown dict key, an empty input or an unsupported type.
        """
        if isinstance(value, EmbeddingInput):
            return value
        if isinstance(value, str):
            return EmbeddingInput(text=value, instruction=instruction)
        if isinstance(value, Path) and value.suffix.lower() in VIDEO_ENDINGS:
            return EmbeddingInput(video=VideoRef.of(value), instruction=instruction)
        if not isinstance(value, dict):
            return EmbeddingInput(images=(ImageRef.of(value),), instruction=instruction)
        unknown = set(value) - {"text", "image", "images", "video", "instruction"}
        if unknown:
            raise UserError(
                f"input has unknown keys {sorted(unknown)}; allowed: text, image, images, video, instruction"
            )
        images = value.get("images", value.get("image", ()))
        images = images if isinstance(images, list | tuple) else [images]
        images = tuple(ImageRef.of(image) for image in images if image is not None)
        video = None if value.get("video") is None else VideoRef.of(value["video"])
        if value.get("text") is None and not images and video is None:
            raise UserError("input is empty; expected text, image or video")
        text = value.get("text")
        given = {"text": bool(text), "image": bool(images), "images": bool(images), "video": video is not None}
        kinds = [key for key in value if given.get(key)]
        text_first = len(kinds) > 1 and kinds[0] == "text"
        return EmbeddingInput(text, images, value.get("instruction", instruction), video, text_first)


def _shown(value: Any) -> str:
    return f"{str(value)[:60]} of type {type(value).__name__}"


Media = ImageRef | VideoRef


def by_content(media: Media) -> bytes:
    """SHA-256 of an image's or a video's content, wherever it is stored. The file is read.

    Raises:
        UserError: if the file is missing.
    """
    return bytes.fromhex(media.digest())


def by_reference(media: Media) -> bytes:
    """SHA-256 of an image's or a video's path, or of its bytes where it is in memory. No file is opened."""
    key = hashlib.sha256()
    for part in dataclasses.fields(media):
        value = getattr(media, part.name)
        if part.compare and value:
            _feed(key, part.name, value, by_reference)
    return key.digest()


def content_key(item: EmbeddingInput, digest: Callable[[Media], bytes] = by_content) -> bytes:
    """What identifies an input: a SHA-256 of all its fields. Equal inputs share a key, and no others do.

    Args:
        item: The input.
        digest: What identifies an image or a video. Default: its content, so that a moved file keeps its key.
            `by_reference` costs no file access; files of equal content then count as different.

    Returns:
        32 bytes, the same on every machine and in every process.

    Raises:
        UserError: as `digest`.
    """
    key = hashlib.sha256()
    for part in dataclasses.fields(item):
        value = getattr(item, part.name)
        if value is not None and value is not False:  # a flag that is not set leaves the key as it was without it
            _feed(key, part.name, value, digest)
    return key.digest()


def _feed(key: Any, name: str, value: Any, digest: Callable[[Media], bytes]) -> None:
    """Adds a field's values to a hash, each after its name and length, so that no two inputs give the same bytes."""
    for piece in value if isinstance(value, tuple) else (value,):
        if isinstance(piece, ImageRef | VideoRef):
            content = digest(piece)
        else:
            content = piece if isinstance(piece, bytes) else str(piece).encode(errors="surrogatepass")
        key.update(f"{name} {len(content)}\n".encode() + content)


@dataclass(frozen=True, slots=True)
class EvalQuery:
    """One query and its candidates.

    Attributes:
        query: The query.
        candidates: Its own candidates (local scope), or the tuple that all queries of a set share (global scope).
        relevant: Positions of the relevant candidates, at least one.
        gains: Relevance of each of them. Empty: all are equally relevant.
    """

    query: EmbeddingInput
    candidates: tuple[EmbeddingInput, ...]
    relevant: tuple[int, ...] = (0,)
    gains: tuple[float, ...] = ()


class Processor(Protocol):
    """Turns inputs into the tensors of a backbone."""

    def __call__(self, inputs: Sequence[EmbeddingInput]) -> Batch:
        """The batch of these inputs, in order."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """What evaluation and search need of a model. A class of ten lines can implement it."""

    def encode(self, inputs: Sequence[EmbeddingInput]) -> np.ndarray:
        """Unit-norm vectors [N, D] in input order."""
        ...
