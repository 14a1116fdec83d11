"""Reads every image of a job once before the job relies on them."""

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
    """Decodes images; where a frozen encoder's outputs are kept, they are made on the way.

    Args:
        embedder: Its backbone's `vision_cache` is filled, if it has one.
        images: Repeats allowed.
        advance: Called with the number of images read since the last call.
        unreadable: Collects what cannot be read, with the reason; None: the first one raises.

    Raises:
        UserError: for an unreadable image, where `unreadable` is None.
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
