"""Locates the images and video frames of a data folder, as files or inside zip and tar archives."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

from vlm2vec.media import archives
from vlm2vec.media.images import ImageRef
from vlm2vec.media.videos import FRAME_ENDINGS, natural, spread

IMAGE_ENDINGS = FRAME_ENDINGS
ARCHIVE_FOLDERS = (
    ".", "image-tasks", "video-tasks", "video-tasks/frames", "visdoc-tasks", "gui-tasks", "gui_tasks"
)  # fmt: skip
"""Glob patterns of the archives, as in the published layouts."""
MOST_PREFIX = 3
"""Maximum number of leading folders that an archive may add or omit (`MMEB/…`, `video_ret/…`)."""


class Media:
    """Locates the images of a data folder; files and archives are opened only when needed.

    The lookup order for a path is: a file; `images_zip/<Set>.zip` of the training layout; `images.zip`; every other
    archive. Archive members may have up to three leading folders more or fewer than the path, as in the published
    archives.

    Args:
        root: The data folder.
        folders: Subfolders that paths may be relative to, such as `image-tasks`.
    """

    def __init__(self, root: Path, folders: tuple[str, ...] = ()) -> None:
        self.root = root
        self._bases = [root, *(root / folder for folder in folders)]
        self._zip = root / "images.zip"
        self._train_zips: dict[str, str | None] = {}
        self._indexes: dict[Path, dict[str, str]] = {}

    def image(self, path: str, origin: str = "") -> ImageRef:
        """Returns a reference to an image without checking that it exists."""
        head, _, member = path.partition("/")
        train_zip = self._train_zip(member.partition("/")[0]) if head == "images" else None
        if train_zip:
            return ImageRef(path=train_zip, member=member, origin=origin)
        if self._has_zip and not self._archives:
            return ImageRef(path=str(self._zip), member=path, origin=origin)
        if not self._archives and len(self._bases) == 1:
            return ImageRef(path=os.path.join(self._root_name, path), origin=origin)  # noqa: PTH118 - once a pair
        for base in self._bases:
            if self._archives and (base / path).is_file():
                return ImageRef(path=str(base / path), origin=origin)
        for archive in (*([self._zip] if self._has_zip else []), *self._archives):
            found = self._index(archive).get(path) or self._without_prefix(archive, path)
            if found:
                return ImageRef(path=str(archive), member=found, origin=origin)
        for base in self._bases:
            if (base / path).is_file():
                return ImageRef(path=str(base / path), origin=origin)
        return ImageRef(path=str(self.root / path), origin=origin)

    def frames(self, folder: str, origin: str = "") -> list[ImageRef]:
        """Returns the images in a folder (or in a folder inside an archive), ordered by the numbers in their names."""
        for base in self._bases:
            if (base / folder).is_dir():
                names = [path.name for path in (base / folder).iterdir() if path.suffix.lower() in IMAGE_ENDINGS]
                return [ImageRef(path=str(base / folder / name), origin=origin) for name in sorted(names, key=natural)]
        wanted = folder.strip("/")
        for archive in self._archives:
            for tail in _tails(wanted):
                names_in = self._folders(archive).get(tail)
                if names_in:
                    return [ImageRef(path=str(archive), member=name, origin=origin) for name in names_in]
        return []

    def subfolders(self, folder: str) -> list[str]:
        """Returns the sorted names of the subfolders that contain images."""
        for base in self._bases:
            if (base / folder).is_dir():
                return sorted(path.name for path in (base / folder).iterdir() if path.is_dir())
        for archive in self._archives:
            for tail in _tails(folder.strip("/")):
                found = {
                    name[len(tail) + 1 :].split("/")[0]
                    for name in self._folders(archive)
                    if name.startswith(f"{tail}/")
                }
                if found:
                    return sorted(found)
        return []

    def _train_zip(self, name: str) -> str | None:
        """The archive of a training set; None where there is none. Looked up once."""
        if name not in self._train_zips:
            place = self.root / "images_zip" / f"{name}.zip"
            self._train_zips[name] = str(place) if place.is_file() else None
        return self._train_zips[name]

    @cached_property
    def _has_zip(self) -> bool:
        return self._zip.is_file()

    @cached_property
    def _root_name(self) -> str:
        return str(self.root)

    @cached_property
    def _archives(self) -> list[Path]:
        found = [path for folder in ARCHIVE_FOLDERS for path in (self.root / folder).glob("*.*") if path.is_file()]
        return sorted(path for path in found if archives.is_archive(path) and path != self._zip)

    def _index(self, archive: Path) -> dict[str, str]:
        """Maps member names with up to three leading folders removed to members; fewer removed folders win."""
        if archive not in self._indexes:
            index: dict[str, str] = {}
            names = sorted(archives.members(archive))
            for dropped in range(MOST_PREFIX + 1):
                for name in names:
                    parts = name.split("/", dropped)
                    if len(parts) > dropped:
                        index.setdefault(parts[-1], name)
            self._indexes[archive] = index
        return self._indexes[archive]

    def _without_prefix(self, archive: Path, path: str) -> str | None:
        index = self._index(archive)
        return next((index[tail] for tail in _tails(path) if tail in index), None)

    def _folders(self, archive: Path) -> dict[str, list[str]]:
        if archive not in self._by_folder:
            folders: dict[str, list[str]] = {}
            for name, member in self._index(archive).items():
                if name.lower().endswith(IMAGE_ENDINGS) and "/" in name:
                    folders.setdefault(name.rpartition("/")[0], []).append(member)
            self._by_folder[archive] = {name: sorted(files, key=natural) for name, files in folders.items()}
        return self._by_folder[archive]

    @cached_property
    def _by_folder(self) -> dict[Path, dict[str, list[str]]]:
        return {}


def sample_frames(frames: list[ImageRef], count: int) -> list[ImageRef]:
    """Selects `count` evenly spaced frames including the first and the last; all frames if there are fewer."""
    return [frames[i] for i in spread(len(frames), count)]


def _tails(path: str) -> list[str]:
    """Returns the path, and the path without its first one, two and three folders."""
    parts = path.split("/")
    return ["/".join(parts[dropped:]) for dropped in range(min(MOST_PREFIX, len(parts) - 1) + 1)]
