from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clips import colour_of, write_video
from hypothesis import given
from hypothesis import strategies as st
from tiny.models import draw_image

from vlm2vec.errors import UserError
from vlm2vec.media.videos import VideoRef, natural, spread
from vlm2vec.retrieval.embedding_cache import InputKeys
from vlm2vec.types import EmbeddingInput

pytest.importorskip("av")


def frame_numbers(video: VideoRef, count: int) -> list[int]:
    """Which frames were taken, told by their colours."""
    every = np.stack([colour_of(i) for i in range(30)]).astype(int)
    found = []
    for frame in video.sample(count).images:
        mean = np.asarray(frame.load())[30:].mean(axis=(0, 1))
        found.append(int(np.abs(every - mean).sum(axis=1).argmin()))
    return found


@given(st.integers(1, 500), st.integers(1, 100))
def test_frames_are_spread_evenly_with_the_first_and_the_last_among_them(total, count):
    places = spread(total, count)
    assert len(places) == min(total, count) and places[0] == 0
    if len(places) > 1:
        gaps = np.diff(places)
        assert places[-1] == total - 1 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_names_are_sorted_by_their_numbers():
    assert sorted(["10.jpg", "9.jpg", "b2", "B10", "a"], key=natural) == ["9.jpg", "10.jpg", "a", "b2", "B10"]


@pytest.mark.parametrize(("codec", "gop"), [("mpeg4", 7), ("libx264", 12), ("libx264", 250)])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 20, 50])
def test_the_frames_of_a_file_are_those_at_the_places_whatever_the_distance_of_key_frames(tmp_path, codec, gop, count):
    video = VideoRef.of(write_video(tmp_path / "a.mp4", codec=codec, gop=gop))
    assert frame_numbers(video, count) == spread(20, count) == video.sample(count).indices
    assert (video.sample(count).total, video.sample(count).fps) == (20, 10.0)


def test_a_file_its_bytes_a_folder_and_a_list_of_its_frames_give_the_same_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", num_frames=12)
    frames = [frame.load() for frame in VideoRef.of(path).sample(12).images]
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"frames/{i}.png")
    (tmp_path / "frames/notes.txt").write_text("no frame")
    for source in (path, path.read_bytes(), tmp_path / "frames", frames):
        assert frame_numbers(VideoRef.of(source), 4) == [0, 3, 7, 11]


def test_an_input_takes_a_video_by_key_or_by_the_ending_of_its_path(tmp_path):
    path = Path("film.mp4")
    assert EmbeddingInput.of({"video": "film.mp4", "text": "t"}) == EmbeddingInput("t", video=VideoRef("film.mp4"))
    assert EmbeddingInput.of(path, "do") == EmbeddingInput(instruction="do", video=VideoRef("film.mp4"))
    assert EmbeddingInput.of({"video": [draw_image(4, 4, 0)]}).video.frames[0].load().size == (4, 4)


def test_kept_vectors_are_found_by_the_content_of_a_video(tmp_path):
    first, second = (write_video(tmp_path / name) for name in ("a.mp4", "b.mp4"))
    other = write_video(tmp_path / "c.mp4", num_frames=9)
    frames = [frame.load() for frame in VideoRef.of(first).sample(3).images]
    keys = InputKeys()
    key, same, differs = (keys(EmbeddingInput.of({"video": path, "text": "t"})) for path in (first, second, other))
    assert key == same != differs
    assert keys(EmbeddingInput.of({"video": frames})) == keys(EmbeddingInput.of({"video": list(frames)}))
    assert keys(EmbeddingInput.of({"video": frames})) != keys(EmbeddingInput.of({"images": frames}))


def broken(tmp_path: Path, kind: str) -> object:
    if kind == "cut":
        whole = write_video(tmp_path / "a.mp4").read_bytes()
        (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
        return tmp_path / "cut.mp4"
    if kind == "empty folder":
        (tmp_path / "empty").mkdir()
        return tmp_path / "empty"
    if kind == "playlist":  # of another file, which must not be read
        write_video(tmp_path / "a.ts", codec="mpeg2video")
        (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:2,\n{tmp_path}/a.ts\n#EXT-X-ENDLIST\n")
        return tmp_path / "list.m3u8"
    return tmp_path / "none.mp4" if kind == "missing" else b"no video"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", r"none\.mp4: the video is missing"),
        ("bytes", "not a readable video"),
        ("cut", r"cut\.mp4"),
        ("empty folder", "folder without frames"),
        ("playlist", r"list\.m3u8"),
    ],
)
def test_a_video_that_cannot_be_read_is_one_clear_line_that_names_it(tmp_path, kind, words):
    with pytest.raises(UserError, match=words) as caught:
        VideoRef.of(broken(tmp_path, kind)).sample(4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"), [([], "without frames"), (7, "type int"), ("https://x.org/a.mp4", "URLs are not fetched")]
)
def test_what_is_no_video_is_refused(source, words):
    with pytest.raises(UserError, match=words):
        EmbeddingInput.of({"video": source})
