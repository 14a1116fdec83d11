"""References to videos (a file, a folder of frames or a list of images) and sampling of their frames."""

from __future__ import annotations

import hashlib
import io
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm2vec.errors import UserError
from vlm2vec.media import documents
from vlm2vec.media.images import ImageRef, is_url

FRAME_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class Frames:
    """Sampled frames of a video, in order.

    Attributes:
        images: The frames.
        indices: Indices of the frames in the video.
        total: Total number of frames in the video.
        fps: Frames per second; None if unknown.
    """

    images: list[ImageRef]
    indices: list[int]
    total: int
    fps: float | None = None


@dataclass(frozen=True, slots=True)
class VideoRef:
    """A video that is not decoded yet.

    Attributes:
        path: A video file, or a folder of frames that are ordered by the numbers in their names.
        data: Bytes of an encoded video, if there is no path.
        frames: The frames, if there is neither path nor data.
        origin: Source of the reference, for error messages.
        sampled: Whether `frames` are already sampled; `sample` then returns all of them. Benchmarks use this to fix
            the number of frames independently of the model's setting.
    """

    path: str | None = None
    data: bytes | None = None
    frames: tuple[ImageRef, ...] = ()
    origin: str = field(default="", compare=False)
    sampled: bool = False

    @staticmethod
    def of(source: Any) -> VideoRef:
        """Creates a reference from a path, bytes, a list of images or another reference.

        Raises:
            UserError: for a URL (URLs are not fetched), an empty list, or an unsupported type.
        """
        if isinstance(source, VideoRef):
            return source
        if isinstance(source, bytes):
            return VideoRef(data=source)
        if isinstance(source, str) and is_url(source):
            raise UserError(f"video {source}: URLs are not fetched; download the video and pass its path")
        if isinstance(source, str | os.PathLike):
            return VideoRef(path=os.fspath(source))
        if isinstance(source, list | tuple):
            if not source:
                raise UserError("video without frames: expected a path or a list of at least one image")
            return VideoRef(frames=tuple(ImageRef.of(frame) for frame in source))
        raise UserError(f"video of type {type(source).__name__}: expected a path, bytes or a list of images")

    def digest(self) -> str:
        """SHA-256 of the content: equal videos have equal digests, independent of their location."""
        if self._images() is not None:
            return hashlib.sha256("".join(frame.digest() for frame in self._images() or ()).encode()).hexdigest()
        with self._open_file() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def sample(self, count: int) -> Frames:
        """Selects `count` evenly spaced frames with first and last; all if there are fewer, or if `sampled`.

        Raises:
            UserError: if the video is missing, not readable or empty, or no decoder is installed.
        """
        images = self._images()
        if images is not None:
            indices = spread(len(images), len(images) if self.sampled else count)
            return Frames([images[i] for i in indices], indices, len(images))
        with self._open_file() as file:
            return self._decode(file, count)

    def __str__(self) -> str:
        place = self.path or (f"video of {len(self.frames)} images" if self.frames else "video given in memory")
        return f"{self.origin}: {place}" if self.origin else place

    def _images(self) -> Sequence[ImageRef] | None:
        """Returns the frames if they are already images; None for an encoded video."""
        if self.path is None or not Path(self.path).is_dir():
            return self.frames or None
        names = [path for path in Path(self.path).iterdir() if path.suffix.lower() in FRAME_ENDINGS]
        if not names:
            raise UserError(f"{self}: a folder without frames; expected images ({', '.join(FRAME_ENDINGS)})")
        ordered = sorted(names, key=lambda path: natural(path.name))
        return [ImageRef(path=str(path), origin=self.origin) for path in ordered]

    @contextmanager
    def _open_file(self) -> Iterator[Any]:
        if self.data is not None:
            yield io.BytesIO(self.data)
            return
        try:
            file = Path(str(self.path)).open("rb")  # noqa: SIM115  (closed below)
        except OSError as error:
            raise UserError(f"{self}: the video is missing; expected a file or a folder of frames there") from error
        with file:
            yield file

    def _decode(self, file: Any, count: int) -> Frames:
        av = documents.need_video()
        try:
            with av.open(file, options=documents.ALONE) as container:
                if not container.streams.video:
                    raise UserError(f"{self}: contains no video stream")
                stream = container.streams.video[0]
                packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
                if not packets:
                    raise UserError(f"{self}: the video has no frames")
                times = sorted(time for time, _ in packets)
                keys = sorted(time for time, is_key in packets if is_key) or times[:1]
                indices = spread(len(times), count)
                images = _pick(container, stream, [times[i] for i in indices], keys)
                if len(images) < len(indices):
                    raise UserError(f"{self}: the video is truncated; copy it again")
                rate = stream.average_rate
                return Frames(images, indices, len(times), float(rate) if rate else None)
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(f"{self}: not a readable video ({str(error).splitlines()[0]})") from error


def _pick(container: Any, stream: Any, wanted: list[int], keys: list[int]) -> list[ImageRef]:
    """Decodes the frames shown at the given times; seeks to the preceding key frame if that saves decoding."""
    images: list[ImageRef] = []
    reached: int | None = None
    decoder: Iterator[Any] = iter(())
    for time in wanted:
        key = keys[max(bisect_right(keys, time) - 1, 0)]
        if reached is None or key > reached:
            container.seek(key, stream=stream)
            decoder = container.decode(stream)
        for frame in decoder:
            reached = frame.pts
            if frame.pts is not None and frame.pts >= time:
                image = frame.to_image()
                images.append(ImageRef.of(image.rotate(frame.rotation, expand=True) if frame.rotation else image))
                break
    return images


def spread(total: int, count: int) -> list[int]:
    """Returns `count` evenly spaced indices below `total`, with first and last; all if there are fewer."""
    if count >= total:
        return list(range(total))
    return [i * (total - 1) // (count - 1) if count > 1 else 0 for i in range(count)]


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that orders names by the numbers in them: `2.jpg` before `10.jpg`."""
    return [(0, int(part)) if part.isdigit() else (1, part.lower()) for part in re.split(r"(\d+)", name)]
