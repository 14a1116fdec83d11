"""Checks that every image of a job is readable, before the job starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

from vlm2vec.cache import cache_folder
from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.media.wholeness import CheckedImages, first_error
from vlm2vec.models.encoding.settings import EncodingModel
from vlm2vec.training.gather import gather_objects, rank, world_size

AT_ONCE = 4096  # images that are looked up and checked together
GROUP = 32  # images of a thread's task
Bad = dict[ImageRef, UserError]


def read_images(
    embedder: EncodingModel,
    images: Iterable[ImageRef],
    advance: Callable[[int], None],
    *,
    decode: bool = False,
    skip: bool = False,
) -> Bad:
    """Checks images; where a frozen encoder's outputs are kept, they are computed on the way.

    Otherwise each rank checks its share of the images, in threads, and images that an earlier run has checked are
    known by path, size and time of their file.

    Args:
        embedder: Its backbone's `vision_cache` is filled, if it has one.
        images: Repeats allowed.
        advance: Called with the number of images done since the last call.
        decode: Decode images as a whole; False: header and end mark, see `vlm2vec.media.wholeness.check_ends`.
        skip: Collect what cannot be read instead of raising.

    Returns:
        The unreadable images of all ranks with the reason of each.

    Raises:
        UserError: for an unreadable image, unless `skip`.
    """
    bad: Bad = {}
    if embedder.backbone.vision_cache is not None:
        embedder.backbone.vision_cache.warm(images, advance, bad.__setitem__ if skip else None)
        return bad
    for found in gather_objects(_check_share(images, advance, decode, skip)):
        bad |= found
    if bad and not skip:
        raise next(iter(bad.values()))
    return bad


def _check_share(images: Iterable[ImageRef], advance: Callable[[int], None], decode: bool, skip: bool) -> Bad:
    """The unreadable images of this rank's share; only the first ones unless `skip`."""
    checked = CheckedImages(cache_folder() / "checked-images", "decode" if decode else "header")
    bad: Bad = {}
    good: list[int] = []
    with ThreadPoolExecutor(min(16, max(2, os.cpu_count() or 2))) as threads:
        for part, keys in _not_known(images, checked, advance):
            groups = [part[start : start + GROUP] for start in range(0, len(part), GROUP)]
            errors = [error for found in threads.map(partial(_errors, decode=decode), groups) for error in found]
            for image, key, error in zip(part, keys, errors, strict=True):
                if error is None:
                    good += [key] if key else []
                else:
                    bad[image] = error
            if bad and not skip:
                break
    checked.add(good)
    return bad


def _not_known(
    images: Iterable[ImageRef], checked: CheckedImages, advance: Callable[[int], None]
) -> Iterator[tuple[list[ImageRef], list[int]]]:
    """Parts of this rank's share that no earlier run has checked, each image once, with their keys."""
    seen: set[int] = set()
    rest = iter(images)
    while part := list(islice(rest, AT_ONCE)):
        keys_N = checked.keys(part)
        mine = (keys_N % world_size() == rank()) & ~checked.known(keys_N)
        new: dict[int, ImageRef] = {}
        unnamed = []  # missing files and images in memory
        for place in mine.nonzero()[0].tolist():
            key = int(keys_N[place])
            if not key:
                unnamed.append(part[place])
            elif key not in seen:
                new[key] = part[place]
        seen.update(new)
        yield [*new.values(), *unnamed], [*new, *[0] * len(unnamed)]
        advance(len(part))


def _errors(images: list[ImageRef], decode: bool) -> list[UserError | None]:
    return [first_error(image, decode) for image in images]
