"""Reads the 18 video sets of MMEB-V2, defined in the table `SETS`. Frames come from the published folders or tars.

Each query or candidate contains at most one video of `Quirks.frames` evenly spaced frames. Model families with video
support receive a video, the others receive the frames as images. Source: the v2 loaders and evaluation settings of the
reference repository.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm2vec.data.mmeb.instruct import candidate_of, query_of
from vlm2vec.data.mmeb.media import Media, sample_frames
from vlm2vec.data.mmeb.quirks import Quirks
from vlm2vec.data.mmeb.video_rows import read_rows, row_files
from vlm2vec.errors import UserError, shown
from vlm2vec.media.text import read_text
from vlm2vec.media.videos import VideoRef
from vlm2vec.types import EmbeddingInput, EvalQuery

Row = dict[str, Any]
ASK = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question: "
)
VIDEO = "Understand the content of the provided video."
CLIP = "Understand the content of the provided video clip."
VIDEO_PLACEHOLDER = "<|video_1|>"
LABELS = Path(__file__).with_name("labels")
"""Class names, one per line, in the order of the reference evaluation."""


@dataclass(frozen=True)
class VideoSet:
    """Defines how the rows of a set are converted to queries.

    Attributes:
        frames: Folder of the frames below the data folder.
        columns: Required columns.
        read: Function from row to query with candidates.
    """

    frames: str
    columns: tuple[str, ...]
    read: Callable[[Row, Reading], EvalQuery]


@dataclass
class Reading:
    """Shared state for reading rows: the location of the frames and the candidates shared between rows."""

    media: Media
    frames: str
    quirks: Quirks
    labels: tuple[EmbeddingInput, ...]
    corpus: dict[str, EmbeddingInput]
    where: str = ""

    def query(self, name: str, instruction: str, text: str | None = None, sample: bool = True) -> EmbeddingInput:
        """Returns a query with a video, an instruction and a text; arguments as `video`."""
        video = self.video(name, sample)
        return query_of(self.quirks, instruction, text, VIDEO_PLACEHOLDER, video=video)

    def candidate(self, name: str, instruction: str, sample: bool = True) -> EmbeddingInput:
        """Returns a candidate that is a video; arguments as `video`."""
        return candidate_of(self.quirks, instruction, VIDEO_PLACEHOLDER, video=self.video(name, sample))

    def video(self, name: str, sample: bool) -> VideoRef:
        """Returns a video.

        Args:
            name: Folder of the frames.
            sample: Whether to select `Quirks.frames` frames; False: use all frames.

        Raises:
            UserError: if the video has no frames.
        """
        origin = f"{self.where}, video {name}"
        found = self.media.frames(f"{self.frames}/{name}", origin)
        if not found:
            raise UserError(f"{self.where}: no frames in {self.media.root / self.frames / name} or in an archive there")
        chosen = sample_frames(found, self.quirks.frames) if sample else found
        rules = self.quirks.rules("frame", frames=len(chosen))
        frames = tuple(frame if rules is None else replace(frame, rules=rules) for frame in chosen)
        return VideoRef(frames=frames, origin=origin, sampled=True)

    def image(self, path: str, instruction: str, text: str) -> EmbeddingInput:
        """Returns a query with an image, an instruction and a text."""
        image = replace(self.media.image(path, self.where), rules=self.quirks.rules("image"))
        return query_of(self.quirks, instruction, text, "<|image_1|>", images=(image,))


def read_video_set(root: Path, name: str, quirks: Quirks, split: str | None = None) -> list[EvalQuery]:
    """Reads the queries of a video set: rows from `<root>/<name>` (see `video_rows`), frames from `video-tasks/frames`.

    Args:
        root: The data folder.
        name: Name of the set.
        quirks: Controls how rows are converted to inputs.
        split: Published split to read, if the folder contains several.

    Raises:
        UserError: for an unknown set, a missing file, column or video, or a correct answer that is not a candidate.
    """
    if name not in SETS:
        raise UserError(f"{name}: unknown video set; known: {', '.join(SETS)}")
    chosen = SETS[name]
    files = row_files(root / name, split)
    if not files:
        raise UserError(
            f"{root / name}: no parquet, jsonl or json files; `vlm2vec data check` prints how to download them"
        )
    rows = list(read_rows(files))
    for column in chosen.columns:
        if not rows or column not in rows[0][1]:
            raise UserError(f"{files[0]}: column {column} is missing; expected {', '.join(chosen.columns)}")
    reading = Reading(Media(root), chosen.frames, quirks, _labels(root, name, rows), {})
    queries = []
    for where, row in rows:
        reading.where = where
        queries.append(chosen.read(row, reading))
    if not reading.corpus:
        return queries
    everything = tuple(reading.corpus.values())  # retrieval: all videos of the set are candidates of every query
    place = {id(item): i for i, item in enumerate(everything)}
    return [EvalQuery(query.query, everything, (place[id(query.candidates[0])],)) for query in queries]


def _labels(root: Path, name: str, rows: list[tuple[str, Row]]) -> tuple[EmbeddingInput, ...]:
    """Returns the class names of `labels.txt` next to the rows, or the bundled ones; unlisted golds are appended."""
    own, shipped = root / name / "labels.txt", LABELS / f"{name}.txt"
    file = own if own.is_file() else shipped
    names = [line for line in read_text(file).splitlines() if line] if file.is_file() else []
    names += [str(row["pos_text"]) for _, row in rows if "pos_text" in row]
    return tuple(EmbeddingInput(name) for name in dict.fromkeys(names))


def _classes(instruction: str) -> Callable[[Row, Reading], EvalQuery]:
    def read(row: Row, reading: Reading) -> EvalQuery:
        query = reading.query(str(row["video_id"]), instruction)
        return EvalQuery(query, reading.labels, (reading.labels.index(EmbeddingInput(str(row["pos_text"]))),))

    return read


def _ssv2(row: Row, reading: Reading) -> EvalQuery:
    ask = "What actions or object interactions are being performed by the person in the video?"
    return _choice(reading, str(row["video_id"]), ask, None, list(row["neg_text"]), row["pos_text"])


def _choice(reading: Reading, video: str, ask: str, text: str | None, options: list[str], gold: str) -> EvalQuery:
    if gold not in options:
        raise UserError(f"{reading.where}: the answer {shown(gold)} is not among its candidates")
    candidates = tuple(EmbeddingInput(option) for option in options)
    return EvalQuery(reading.query(video, ask, text), candidates, (options.index(gold),))


def _lettered(question: str, options: list[str]) -> tuple[str, list[str]]:
    """Returns the question followed by its lettered options, and the lettered options."""
    named = [f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(options)]
    return "\n".join([question, "Options:", *named]).rstrip(), named


def _bare(option: str) -> str:
    """Strips the letter and the final period: `A. a red car.` -> `a red car`."""
    return option[option.find(". ") :].strip(". ")


def _video_mme(row: Row, reading: Reading) -> EvalQuery:
    options = list(row["options"])
    text = "\n".join([row["question"], *options])
    gold = options["ABCD".index(row["answer"])]
    return _choice(reading, str(row["videoID"]), ASK, text, [_bare(option) for option in options], _bare(gold))


def _nextqa(row: Row, reading: Reading) -> EvalQuery:
    options = [str(row[f"a{i}"]) for i in range(5)]
    text, _ = _lettered(row["question"], options)
    return _choice(reading, str(row["video"]), ASK, text, options, options[int(row["answer"])])


def _egoschema(row: Row, reading: Reading) -> EvalQuery:
    options = list(row["option"])
    text = f"{row['question']}{' '.join(options)}"
    bare = [_bare(option) for option in options]
    return _choice(reading, str(row["video_idx"]), ASK, text, bare, bare[int(row["answer"])])


def _mvbench(row: Row, reading: Reading) -> EvalQuery:
    options = list(row["candidates"])
    text, named = _lettered(row["question"], options)
    if row["answer"] not in options:
        raise UserError(f"{reading.where}: the answer {shown(row['answer'])} is not among its candidates")
    last = len(options) - 1 - options[::-1].index(row["answer"])  # repeated options: the last, as in the reference
    return _choice(reading, f"{row['subset']}/{row['video']}", ASK, text, named, named[last])


def _activitynet(row: Row, reading: Reading) -> EvalQuery:
    text = f"{row['question']}? (A) yes; (B) no."
    return _choice(reading, f"v_{row['video_name']}", ASK, text, ["yes", "no"], row["answer"])


def _found_by(instruction: str, video: str, caption: str) -> Callable[[Row, Reading], EvalQuery]:
    """Returns a reader for text-to-video sets; of several captions, the first is used."""

    def read(row: Row, reading: Reading) -> EvalQuery:
        name = str(row[video])
        name = Path(name).stem if video == "video" else name
        words = row[caption] if isinstance(row[caption], str) else row[caption][0]
        if name not in reading.corpus:
            reading.corpus[name] = reading.candidate(name, VIDEO)
        return EvalQuery(query_of(reading.quirks, instruction, words), (reading.corpus[name],))

    return read


def _moment(row: Row, reading: Reading) -> EvalQuery:
    """Reads a row whose video folder contains `query` and a folder per clip; the name of the gold starts "positive"."""
    name = Path(str(row["video_path"])).stem
    ask = "Find the clip that corresponds to the described scene in the given video:"
    clips = [clip for clip in reading.media.subfolders(f"{reading.frames}/{name}") if clip != "query"]
    golds = [i for i, clip in enumerate(clips) if clip.startswith("positive")]
    candidates = tuple(reading.candidate(f"{name}/{clip}", VIDEO) for clip in clips)
    # A query without a positive clip counts as a miss, as in the reference evaluation.
    return EvalQuery(reading.query(f"{name}/query", ask, row["query"]), candidates, tuple(golds[-1:]))


def _moment_seeker(row: Row, reading: Reading) -> EvalQuery:
    """Reads a row of MomentSeeker; clips use all frames of their folder."""

    def clip(path: str) -> str:
        return "video_frames/" + path.replace("/", "_").split(".mp4")[0]

    given, words = str(row["input_frames"] or ""), row["query"]
    if given.endswith(".mp4"):
        ask = "Find the clip that corresponds to the given sentence and video segment:"
        query = reading.query(clip(given), ask, words, sample=False)
    elif given.endswith(".jpg"):
        ask = "Select the video clip that aligns with the given text and image:"
        query = reading.image(f"{reading.frames}/query_{given}", ask, words)
    else:
        query = query_of(reading.quirks, "Find the clip that corresponds to the given text:", words)
    golds, others = (
        [clip(entry["output_path"]) for entry in row[f"{side}_frames"]] for side in ("positive", "negative")
    )
    candidates = tuple(reading.candidate(name, CLIP, sample=False) for name in [*golds, *others])
    return EvalQuery(query, candidates, tuple(range(len(golds))))


CLASSES = ("video_id", "pos_text")
FRAMES = "video-tasks/frames"
SETS = {
    "K700": VideoSet(f"{FRAMES}/video_cls/K700", CLASSES, _classes("Recognize the category of the video content.")),
    "SmthSmthV2": VideoSet(f"{FRAMES}/video_cls/SSv2", (*CLASSES, "neg_text"), _ssv2),
    "HMDB51": VideoSet(
        f"{FRAMES}/video_cls/HMDB51",
        CLASSES,
        _classes("What actions or objects interactions are the person in the video doing?"),
    ),
    "UCF101": VideoSet(
        f"{FRAMES}/video_cls/UCF101",
        CLASSES,
        _classes("What activities or sports are being performed by the person in the video?"),
    ),
    "Breakfast": VideoSet(
        f"{FRAMES}/video_cls/Breakfast",
        CLASSES,
        _classes("Recognize the breakfast type that the person is cooking in the video. "),
    ),
    "MVBench": VideoSet(
        f"{FRAMES}/video_qa/MVBench", ("subset", "question", "video", "candidates", "answer"), _mvbench
    ),
    "Video-MME": VideoSet(f"{FRAMES}/video_qa/Video-MME", ("question", "videoID", "options", "answer"), _video_mme),
    "NExTQA": VideoSet(f"{FRAMES}/video_qa/NExTQA", ("video", "question", "answer", "a0", "a4"), _nextqa),
    "EgoSchema": VideoSet(f"{FRAMES}/video_qa/EgoSchema", ("video_idx", "question", "answer", "option"), _egoschema),
    "ActivityNetQA": VideoSet(f"{FRAMES}/video_qa/ActivityNetQA", ("video_name", "question", "answer"), _activitynet),
    "DiDeMo": VideoSet(
        f"{FRAMES}/video_ret/DiDeMo",
        ("video", "caption"),
        _found_by("Find a video that includes the following described scenes:", "video", "caption"),
    ),
    "MSR-VTT": VideoSet(
        f"{FRAMES}/video_ret/MSR-VTT",
        ("video_id", "caption"),
        _found_by("Find a video that contains the following visual content:", "video_id", "caption"),
    ),
    "MSVD": VideoSet(
        f"{FRAMES}/video_ret/MSVD",
        ("video_id", "caption"),
        _found_by("Find the video snippet that corresponds to the given summary:", "video_id", "caption"),
    ),
    "VATEX": VideoSet(
        f"{FRAMES}/video_ret/VATEX",
        ("videoID", "enCap"),
        _found_by("Select a video that fits the description provided:", "videoID", "enCap"),
    ),
    "YouCook2": VideoSet(
        f"{FRAMES}/video_ret/YouCook2",
        ("id", "sentence"),
        _found_by("Find a video that demonstrates the following action while making a recipe:", "id", "sentence"),
    ),
    "QVHighlight": VideoSet(f"{FRAMES}/video_mret/QVHighlight", ("query", "video_path"), _moment),
    "Charades-STA": VideoSet(f"{FRAMES}/video_mret/Charades_STA", ("query", "video_path"), _moment),
    "MomentSeeker": VideoSet(
        f"{FRAMES}/video_mret/MomentSeeker",
        ("query", "positive_frames", "negative_frames", "input_frames"),
        _moment_seeker,
    ),
}
