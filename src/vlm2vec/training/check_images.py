"""Checks that every image of a job is readable, before the job starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.models.embedder import Embedder


def read_images(
    embedder: Embedder,
    images: Iterable[ImageRef],
    advance: Callable[[int], None],
    unreadable: dict[ImageRef, UserError] | None = None,
) -> None:
    """Decodes all images and fills the backbone's cache of frozen vision features, if it has one.

    Args:
        embedder: The model; its backbone's `vision_cache` is filled, if present.
        images: The images; repeated images are read once.
        advance: Called with the number of images read since the last call.
        unreadable: Collects unreadable images with the reason; None: raise at the first unreadable image.

    Raises:
        UserError: for an unreadable image if `unreadable` is None.
    """
    on_error = None if unreadable is None else unreadable.__setitem__
    if embedder.backbone.vision_cache is not None:
        embedder.backbone.vision_cache.warm(images, advance, on_error)
        return
    for image in dict.fromkeys(images):
        try:
            image.load()
        except UserError as error:
            if on_error is None:
                raise
            on_error(image, error)
        advance(1)
