"""Inputs of a model and their identity, and the interfaces that packages share.

Shapes: B examples, M targets, L tokens, D embedding dim.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from PIL import Image

from vlm2vec.errors import UserError
from vlm2vec.media.documents import VIDEO_ENDINGS
from vlm2vec.media.images import ImageRef, named_images
from vlm2vec.media.videos import VideoRef

if TYPE_CHECKING:
    import numpy as np

    from vlm2vec.batch import Batch

BARE_IMAGE_TOKEN = "<|image_pad|>"  # noqa: S105
"""Marks the model's own image token in the text of an input that has no image."""


@dataclass(frozen=True, slots=True)
class EmbeddingInput:
    """One input, which becomes one vector: text, images, a video or any combination, with an optional instruction.

    Attributes:
        text: Free text. If it contains the canonical placeholder `<|image_1|>`, it is used verbatim as the prompt.
        images: Images in the order of their placeholders, not decoded yet.
        instruction: Task of the vector, such as "Represent the given image for classification." Ignored if `text`
            contains a placeholder, because the text is then the whole prompt.
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
        """Checks the types, so that a missing or numeric text in a table is an error of that input only.

        Raises:
            UserError: naming the field and its value.
        """
        for name, value in (("text", self.text), ("instruction", self.instruction)):
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
        if not isinstance(value, Mapping):
            if not isinstance(value, ImageRef | Image.Image | bytes | os.PathLike):
                raise UserError(
                    f"input: found {_shown(value)}; expected a text, an image or its path, or a dict of these"
                )
            return EmbeddingInput(images=(ImageRef.of(value),), instruction=instruction)
        unknown = set(value) - {"text", "image", "images", "video", "instruction"}
        if unknown:
            raise UserError(
                f"input has unknown keys {sorted(unknown)}; allowed: text, image, images, video, instruction"
            )
        images = tuple(ImageRef.of(image) for image in named_images(value) if image is not None)
        video = None if value.get("video") is None else VideoRef.of(value["video"])
        if value.get("text") is None and not images and video is None:
            raise UserError("input is empty; expected text, image or video")
        text = value.get("text")
        given = {"text": bool(text), "image": bool(images), "images": bool(images), "video": video is not None}
        kinds = [key for key in value if given.get(key)]
        text_first = len(kinds) > 1 and kinds[0] == "text"
        return EmbeddingInput(text, images, value.get("instruction", instruction), video, text_first)


def require_many(values: Any, name: str) -> None:
    """Checks that inputs are given as a list or another iterable: iterating a text or a table would embed its parts.

    Args:
        values: The argument.
        name: Its name, or that of the function, for the message.

    Raises:
        UserError: for None, a single input, and a table, whose iterator gives names of columns.
    """
    if hasattr(values, "columns"):
        raise UserError(f"{name} expects a list of inputs, found a {type(values).__name__}; pass one of its columns")
    single = isinstance(values, str | bytes | Mapping | Path | Image.Image | ImageRef | EmbeddingInput)
    if single or not isinstance(values, Iterable):
        raise UserError(f"{name} expects a list of inputs, found {_shown(values)}; wrap a single input: [input]")


def _shown(value: Any) -> str:
    return f"{str(value)[:60]} of type {type(value).__name__}"


Media = ImageRef | VideoRef
INPUT_FIELDS = tuple(field.name for field in dataclasses.fields(EmbeddingInput))


def by_content(media: Media) -> bytes:
    """SHA-256 of the content of an image or a video. Reads the file.

    Raises:
        UserError: if the file is missing.
    """
    return bytes.fromhex(media.digest())


def by_reference(media: Media) -> bytes:
    """SHA-256 of the path of an image or a video, or of its bytes if it is in memory. Opens no file."""
    key = hashlib.sha256()
    for part in dataclasses.fields(media):
        value = getattr(media, part.name)
        if part.compare and value:
            _feed(key, part.name, value, by_reference)
    return key.digest()


def content_key(item: EmbeddingInput, digest: Callable[[Media], bytes] = by_content) -> bytes:
    """SHA-256 over all fields of an input. Equal inputs share a key; different inputs have different keys.

    Args:
        item: The input.
        digest: Key of an image or a video. Default: a hash of its content, so that a moved file keeps its key.
            `by_reference` reads no file, but gives two files of equal content different keys.

    Returns:
        32 bytes, the same on every machine and in every process.

    Raises:
        UserError: as `digest`.
    """
    key = hashlib.sha256()
    for name in INPUT_FIELDS:
        value = getattr(item, name)
        if value is not None and value is not False:  # a flag that is not set leaves the key as it was without it
            _feed(key, name, value, digest)
    return key.digest()


def _feed(key: Any, name: str, value: Any, digest: Callable[[Media], bytes]) -> None:
    """Adds a field's values to a hash. Each follows its name and length, so different inputs feed different bytes."""
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
        candidates: The candidates of this query (local scope), or the tuple that all queries share (global scope).
        relevant: Positions of the relevant candidates, at least one.
        gains: Relevance of each candidate in `relevant`. Empty: all are equally relevant.
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
    """The method that evaluation and search call. Any class with this method is an encoder."""

    def encode(self, inputs: Sequence[EmbeddingInput]) -> np.ndarray:
        """Unit-norm vectors [N, D] in input order."""
        ...
