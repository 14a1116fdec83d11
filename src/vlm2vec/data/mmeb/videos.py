"""The 18 video sets of MMEB-V2: a row of a small table each. Frames come from the published frame folders or tars.

A query or candidate holds one video, `Quirks.frames` frames at equal distances. Families that read videos read it as
such; others read the frames as images. Facts: the reference repository's loaders, v2, and its evaluation settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm2vec.data.mmeb.instruct import joined
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
"""Class names, one a line, in the reference evaluation's order."""


@dataclass(frozen=True)
class VideoSet:
    """How one set's rows become queries.

    Attributes:
        frames: Folder of its frames below the data folder.
        columns: What its rows must have.
        read: Row -> query, with its candidates.
    """

    frames: str
    columns: tuple[str, ...]
    read: Callable[[Row, Reading], EvalQuery]


@dataclass
class Reading:
    """What reading a row needs: where frames are, and candidates that rows share."""

    media: Media
    frames: str
    quirks: Quirks
    labels: tuple[EmbeddingInput, ...]
    corpus: dict[str, EmbeddingInput]
    where: str = ""

    def video(self, name: str, text: str, sample: bool = True) -> EmbeddingInput:
        """An input of a video and a text.

        Args:
            name: Folder of the frames.
            text: After the video.
            sample: Take `Quirks.frames` of them; False: all.

        Raises:
            UserError: if the video has no frames.
        """
        origin = f"{self.where}, video {name}"
        found = self.media.frames(f"{self.frames}/{name}", origin)
        if not found:
            raise UserError(
                f"{self.where}: no frames in {self.media.root / self.frames / name} nor in an archive there"
            )
        chosen = sample_frames(found, self.quirks.frames) if sample else found
        rules = self.quirks.rules("frame", frames=len(chosen))
        frames = tuple(frame if rules is None else replace(frame, rules=rules) for frame in chosen)
        return EmbeddingInput(f"{VIDEO_PLACEHOLDER} {text}", video=VideoRef(frames=frames, origin=origin, sampled=True))

    def image(self, path: str, text: str) -> EmbeddingInput:
        """An input of an image and a text."""
        image = replace(self.media.image(path, self.where), rules=self.quirks.rules("image"))
        return EmbeddingInput(f"<|image_1|> {text}", (image,))


def read_video_set(root: Path, name: str, quirks: Quirks, split: str | None = None) -> list[EvalQuery]:
    """Queries of one video set: rows in `<root>/<name>` (see `video_rows`), frames below `video-tasks/frames`.

    Args:
        root: The data folder.
        name: Of the set.
        quirks: How rows become inputs.
        split: Which of the published splits, where the folder holds several.

    Raises:
        UserError: for an unknown set, a missing file, column or video, or a gold that is no candidate.
    """
    if name not in SETS:
        raise UserError(f"{name}: no such video set; known: {', '.join(SETS)}")
    chosen = SETS[name]
    files = row_files(root / name, split)
    if not files:
        raise UserError(
            f"{root / name}: no parquet, jsonl or json files there; `vlm2vec data check` says how to get them"
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
    everything = tuple(reading.corpus.values())  # retrieval: every video of the set is every query's candidate
    place = {id(item): i for i, item in enumerate(everything)}
    return [EvalQuery(query.query, everything, (place[id(query.candidates[0])],)) for query in queries]


def _labels(root: Path, name: str, rows: list[tuple[str, Row]]) -> tuple[EmbeddingInput, ...]:
    """Class names of `labels.txt` beside the rows, else those of the package; golds that these lack come last."""
    own, shipped = root / name / "labels.txt", LABELS / f"{name}.txt"
    file = own if own.is_file() else shipped
    names = [line for line in read_text(file).splitlines() if line] if file.is_file() else []
    names += [str(row["pos_text"]) for _, row in rows if "pos_text" in row]
    return tuple(EmbeddingInput(name) for name in dict.fromkeys(names))


def _classes(instruction: str) -> Callable[[Row, Reading], EvalQuery]:
    def read(row: Row, reading: Reading) -> EvalQuery:
        query = reading.video(str(row["video_id"]), instruction)
        return EvalQuery(query, reading.labels, (reading.labels.index(EmbeddingInput(str(row["pos_text"]))),))

    return read


def _ssv2(row: Row, reading: Reading) -> EvalQuery:
    ask = "What actions or object interactions are being performed by the person in the video?"
    return _choice(reading, str(row["video_id"]), ask, list(row["neg_text"]), row["pos_text"])


def _choice(reading: Reading, video: str, text: str, options: list[str], gold: str) -> EvalQuery:
    if gold not in options:
        raise UserError(f"{reading.where}: the answer {shown(gold)} is not among its candidates")
    candidates = tuple(EmbeddingInput(option) for option in options)
    return EvalQuery(reading.video(video, text), candidates, (options.index(gold),))


def _lettered(question: str, options: list[str]) -> tuple[str, list[str]]:
    """A question with its options written below, and the options as written."""
    named = [f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(options)]
    return "\n".join([question, "Options:", *named]).rstrip(), named


def _bare(option: str) -> str:
    """`A. a red car.` -> `a red car`."""
    return option[option.find(". ") :].strip(". ")


def _video_mme(row: Row, reading: Reading) -> EvalQuery:
    options = list(row["options"])
    text = f"{ASK} {row['question']}\n" + "\n".join(options)
    gold = options["ABCD".index(row["answer"])]
    return _choice(reading, str(row["videoID"]), text, [_bare(option) for option in options], _bare(gold))


def _nextqa(row: Row, reading: Reading) -> EvalQuery:
    options = [str(row[f"a{i}"]) for i in range(5)]
    text, _ = _lettered(f"{ASK} {row['question']}", options)
    return _choice(reading, str(row["video"]), text, options, options[int(row["answer"])])


def _egoschema(row: Row, reading: Reading) -> EvalQuery:
    options = list(row["option"])
    text = f"{ASK} {row['question']}{' '.join(options)}"
    bare = [_bare(option) for option in options]
    return _choice(reading, str(row["video_idx"]), text, bare, bare[int(row["answer"])])


def _mvbench(row: Row, reading: Reading) -> EvalQuery:
    options = list(row["candidates"])
    text, named = _lettered(f"{ASK} {row['question']}", options)
    if row["answer"] not in options:
        raise UserError(f"{reading.where}: the answer {shown(row['answer'])} is not among its candidates")
    last = len(options) - 1 - options[::-1].index(row["answer"])  # as the reference where options repeat
    return _choice(reading, f"{row['subset']}/{row['video']}", text, named, named[last])


def _activitynet(row: Row, reading: Reading) -> EvalQuery:
    text = f"{ASK} {row['question']}? (A) yes; (B) no."
    return _choice(reading, f"v_{row['video_name']}", text, ["yes", "no"], row["answer"])


def _found_by(instruction: str, video: str, caption: str) -> Callable[[Row, Reading], EvalQuery]:
    """Text to video; of several captions the first counts."""

    def read(row: Row, reading: Reading) -> EvalQuery:
        name = str(row[video])
        name = Path(name).stem if video == "video" else name
        words = row[caption] if isinstance(row[caption], str) else row[caption][0]
        if name not in reading.corpus:
            reading.corpus[name] = reading.video(name, VIDEO)
        return EvalQuery(EmbeddingInput(joined(instruction, words)), (reading.corpus[name],))

    return read


def _moment(row: Row, reading: Reading) -> EvalQuery:
    """The video's folder holds `query` and one folder a clip, the gold's name beginning with "positive"."""
    name = Path(str(row["video_path"])).stem
    ask = "Find the clip that corresponds to the described scene in the given video:"
    clips = [clip for clip in reading.media.subfolders(f"{reading.frames}/{name}") if clip != "query"]
    golds = [i for i, clip in enumerate(clips) if clip.startswith("positive")]
    candidates = tuple(reading.video(f"{name}/{clip}", VIDEO) for clip in clips)
    # Without a positive clip the query is a miss, as in the reference evaluation.
    return EvalQuery(reading.video(f"{name}/query", joined(ask, row["query"])), candidates, tuple(golds[-1:]))


def _moment_seeker(row: Row, reading: Reading) -> EvalQuery:
    """All frames of a clip's folder are read, none left out."""

    def clip(path: str) -> str:
        return "video_frames/" + path.replace("/", "_").split(".mp4")[0]

    given, words = str(row["input_frames"] or ""), row["query"]
    if given.endswith(".mp4"):
        ask = "Find the clip that corresponds to the given sentence and video segment:"
        query = reading.video(clip(given), joined(ask, words), sample=False)
    elif given.endswith(".jpg"):
        ask = "Select the video clip that aligns with the given text and image:"
        query = reading.image(f"{reading.frames}/query_{given}", joined(ask, words))
    else:
        query = EmbeddingInput(joined("Find the clip that corresponds to the given text:", words))
    golds, others = (
        [clip(entry["output_path"]) for entry in row[f"{side}_frames"]] for side in ("positive", "negative")
    )
    candidates = tuple(reading.video(name, CLIP, sample=False) for name in [*golds, *others])
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
