"""Reads the document and video sets of VLM2Vec-V2's training mixture, with the prompts of its training code.

| set | files below the data folder |
|---|---|
| `colpali_train_set` | `colpali_train_set/` (also `data/` in it): parquet of vidore/colpali_train_set |
| `visrag-indomain` | `visrag-indomain/`: parquet of openbmb/VisRAG-Ret-Train-In-domain-data |
| `video_caption_300k`, `video_caption_300k-video` | `video_instruction/train/sft/video_caption_300k.jsonl` |
| `video_qa_240k` | `video_instruction/train/sft/video_240k_caption_15k.jsonl` |

Video frames are in `train_300k/<video>/` or in tar files in that folder. These files may also be in a folder
`train_video_and_instruction/`, the name of their hub dataset (ShareGPTVideo). Videos without frames are skipped.
Source: `src/data/dataset` and `experiments/public/train/train_alltasks.yaml` of the reference repository (6e1e1d4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from vlm2vec.data.examples import TrainExample
from vlm2vec.data.json_lines import JsonLines
from vlm2vec.data.mmeb.media import sample_frames
from vlm2vec.errors import UserError
from vlm2vec.media import archives
from vlm2vec.media.cells import parquet_errors
from vlm2vec.media.images import ImageRef
from vlm2vec.media.videos import FRAME_ENDINGS, VideoRef, natural
from vlm2vec.types import EmbeddingInput

NUM_FRAMES = 8
IMAGE, VIDEO = "<|image_1|>", "<|video_1|>"
FRAMES_FOLDER = "train_300k"
SFT = "video_instruction/train/sft"
HUB_FOLDER = "train_video_and_instruction"
PROMPTS_FILE = Path(__file__).with_name("visrag_prompts.yaml")
"""Query and target prompts of the VisRAG set, by the source of the row."""
ASK_VIDEO = "Answer a question based on the content of a video. "
FIND_VIDEO = "Find a video that contains the following visual content: "
READ_VIDEO = "Understand the content of the provided video: "

Row = Mapping[str, Any]
Sides = tuple[EmbeddingInput, EmbeddingInput]


def _colpali(row: Row, page: ImageRef) -> Sides:
    """Builds a pair: the query contains the page, the target is the answer. The column `prompt` is not used."""
    return EmbeddingInput(f"{IMAGE} {row['query']}", (page,)), EmbeddingInput(str(row["answer"]))


def _visrag(row: Row, page: ImageRef) -> Sides:
    asks, reads = (_prompts()[side].get(str(row["source"]), "") for side in ("query", "target"))
    query = f"{asks} {row['query']} " if asks else f"{row['query']} "
    return EmbeddingInput(query), EmbeddingInput(f"{reads}  {IMAGE}" if reads else f" {IMAGE}", (page,))


def _caption(row: Row, video: VideoRef) -> Sides:
    asked, told = _turns(row)
    return EmbeddingInput(asked.replace("<video>", VIDEO), video=video), EmbeddingInput(told)


def _found_video(row: Row, video: VideoRef) -> Sides:
    return EmbeddingInput(FIND_VIDEO + _turns(row)[1]), EmbeddingInput(READ_VIDEO + VIDEO, video=video)


def _video_question(row: Row, video: VideoRef) -> Sides:
    asked, told = _turns(row)
    return EmbeddingInput(ASK_VIDEO + asked.replace("<video>", VIDEO), video=video), EmbeddingInput(told)


@dataclass(frozen=True)
class PageSet:
    """A set in parquet files whose column `image` contains the pages.

    Attributes:
        columns: Required columns besides the image.
        sides: Function from row and page to query and target.
    """

    columns: tuple[str, ...]
    sides: Callable[[Row, ImageRef], Sides]


@dataclass(frozen=True)
class VideoSet:
    """A set in a JSON lines file of conversations about videos.

    Attributes:
        file: Name of the file.
        sides: Function from row and video to query and target.
    """

    file: str
    sides: Callable[[Row, VideoRef], Sides]


SETS: dict[str, PageSet | VideoSet] = {
    "colpali_train_set": PageSet(("query", "answer"), _colpali),
    "visrag-indomain": PageSet(("query", "source"), _visrag),
    "video_caption_300k": VideoSet("video_caption_300k.jsonl", _caption),
    "video_caption_300k-video": VideoSet("video_caption_300k.jsonl", _found_video),
    "video_qa_240k": VideoSet("video_240k_caption_15k.jsonl", _video_question),
}


def set_files(root: Path, name: str) -> list[Path]:
    """Returns the files of one of the `SETS` below a data folder; empty if the set is not present."""
    chosen = SETS[name]
    if isinstance(chosen, PageSet):
        return sorted([*(root / name).glob("*.parquet"), *(root / name).glob("data/*.parquet")])
    places = [root / folder / SFT / chosen.file for folder in ("", HUB_FOLDER)]
    return [place for place in places if place.is_file()][:1]


class PageFile:
    """A parquet file of a `PageSet`; its blocks are its row groups. Pages are not loaded.

    Attributes:
        sizes: Number of pairs in each block.
    """

    def __init__(self, file: Path, name: str) -> None:
        self._path, self._name, self._set = file, name, SETS[name]
        assert isinstance(self._set, PageSet)
        with parquet_errors(file):
            self._file = pq.ParquetFile(file)
        for column in (*self._set.columns, "image"):
            if column not in self._file.schema_arrow.names:
                expected = ", ".join((*self._set.columns, "image"))
                raise UserError(f"{file}: column {column} is missing; expected {expected}")
        self.sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._begins = [0, *accumulate(self.sizes)]

    def read(self, number: int) -> list[TrainExample]:
        """The pairs of a block."""
        assert isinstance(self._set, PageSet)
        with parquet_errors(self._path):
            rows = self._file.read_row_group(number, columns=list(self._set.columns)).to_pylist()
        found = []
        for i, row in enumerate(rows, start=self._begins[number]):
            where = f"{self._path}, row {i}"
            page = ImageRef(path=str(self._path), member=f"image[{i}]", origin=where)
            found.append(TrainExample(*self._set.sides(row, page), source=self._name, origin=where))
        return found


class ConversationFile:
    """A JSON lines file of a `VideoSet` in blocks; rows whose video has no frames are skipped.

    Attributes:
        sizes: Number of pairs in each block.
    """

    def __init__(self, file: Path, name: str) -> None:
        self._name, self._set = name, SETS[name]
        self._frames = _FrameFolders(file.parents[3] / FRAMES_FOLDER)
        self._lines = JsonLines(file, keep=lambda row: str(row.get("video")) in self._frames)
        self.sizes = self._lines.sizes
        if not self.sizes:
            raise UserError(f"{file}: no video has frames in {self._frames.root}; expected folders or tars of frames")

    def read(self, number: int) -> list[TrainExample]:
        """The pairs of a block."""
        assert isinstance(self._set, VideoSet)
        found = []
        for where, row in self._lines.read(number):
            frames = sample_frames(self._frames.of(str(row["video"]), where), NUM_FRAMES)
            video = VideoRef(frames=tuple(frames), origin=where, sampled=True)
            try:
                query, target = self._set.sides(row, video)
            except (KeyError, ValueError, TypeError) as error:
                expected = 'video, and conversations with two turns {"from": …, "value": …}'
                raise UserError(f"{where}: expected {expected}") from error
            found.append(TrainExample(query, target, source=self._name, origin=where))
        return found


class _FrameFolders:
    """Indexes the videos with frames below a folder: folders of images, or folders of images in tar files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        entries = sorted(root.iterdir()) if root.is_dir() else []
        self._folders = {entry.name for entry in entries if entry.is_dir()}
        self._packed: dict[str, tuple[Path, list[str]]] = {}
        for archive in entries:
            if archives.is_archive(archive):
                for member in archives.members(archive):
                    folder = member.rpartition("/")[0].rpartition("/")[2]
                    if member.lower().endswith(FRAME_ENDINGS):
                        self._packed.setdefault(folder, (archive, []))[1].append(member)

    def __contains__(self, video: str) -> bool:
        return video in self._folders or video in self._packed

    def of(self, video: str, origin: str) -> list[ImageRef]:
        """Returns the frames of a video, ordered by the numbers in their names."""
        if video in self._folders:
            names = [entry.name for entry in (self.root / video).iterdir()]
            frames = sorted((name for name in names if name.lower().endswith(FRAME_ENDINGS)), key=natural)
            return [ImageRef(path=str(self.root / video / name), origin=origin) for name in frames]
        archive, members = self._packed[video]
        return [ImageRef(path=str(archive), member=name, origin=origin) for name in sorted(members, key=natural)]


def open_conversations(file: Path, name: str) -> ConversationFile:
    """Returns a cached `ConversationFile`; forked processes can share it, since it keeps no file open.

    Raises:
        UserError: as `ConversationFile`.
    """
    about = file.stat()
    return _indexed(file, name, (about.st_mtime_ns, about.st_size))


@lru_cache(maxsize=8)
def _indexed(file: Path, name: str, stamp: tuple[int, int]) -> ConversationFile:
    return ConversationFile(file, name)


def _turns(row: Row) -> tuple[str, str]:
    asked, told = row["conversations"][:2]
    return str(asked["value"]), str(told["value"])


@lru_cache(maxsize=1)
def _prompts() -> dict[str, dict[str, str]]:
    prompts: dict[str, dict[str, str]] = yaml.safe_load(PROMPTS_FILE.read_text(encoding="utf-8"))
    return prompts
