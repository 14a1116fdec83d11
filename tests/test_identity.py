"""The identity of an input: one function for comparing, caching and masking inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny.fixtures import tiny_vlm  # noqa: F401
from tiny.models import draw_image

from vlm2vec import Embedder, EmbeddingInput, UserError
from vlm2vec.batch import Batch
from vlm2vec.data.collate import collate_pairs
from vlm2vec.data.examples import TrainExample
from vlm2vec.jobs.indexing import _look
from vlm2vec.media.images import ImageRef
from vlm2vec.media.videos import VideoRef
from vlm2vec.models.encoding.pipeline import Pipeline
from vlm2vec.models.encoding.settings import EncodeSettings
from vlm2vec.models.vision.frozen_vision import row_keys
from vlm2vec.retrieval.embedding_cache import InputKeys
from vlm2vec.serving.engine import Engine
from vlm2vec.types import by_content, by_reference, content_key

RED, BLUE = (ImageRef.of(draw_image(8, 8, seed)) for seed in (1, 2))
FILMS = (VideoRef(frames=(RED, BLUE)), VideoRef(frames=(BLUE, RED)), VideoRef(frames=(RED,)), VideoRef(data=b"1"))
# Values of each field that differ, and None or () where the field may be left out.
VALUES: dict[str, tuple[object, ...]] = {
    "text": (None, "", "a", "b", "?", "\ud800", "image 1\n"),
    "images": ((), (RED,), (BLUE,), (RED, BLUE), (BLUE, RED)),
    "instruction": (None, "", "a", "b"),
    "video": (None, *FILMS),
    "text_first": (False, True),
}
INPUTS = st.builds(EmbeddingInput, **{name: st.sampled_from(values) for name, values in VALUES.items()})


def letters(inputs: Sequence[EmbeddingInput]) -> Batch:
    return Batch({"input_ids": torch.zeros(len(inputs), 1, dtype=torch.long)})


def in_training(item: EmbeddingInput) -> object:
    batch = collate_pairs(letters, [TrainExample(item, item)])
    assert batch.query_keys.tolist() == batch.target_keys.tolist()
    return int(batch.target_keys[0])


class Model(torch.nn.Module):
    """Enough of an `Embedder` to key inputs."""

    device, embedding_dim = torch.device("cpu"), 2
    backbone = type("Bare", (), {"vision_cache": None})()


def in_encoding(item: EmbeddingInput) -> object:
    pipeline = Pipeline(Model(), EncodeSettings())  # type: ignore[arg-type]
    key = next(iter(pipeline._keyed([item], None)))[1]  # type: ignore[arg-type]
    return item if isinstance(key, UserError) else key  # a refused input shares its error with nobody


def in_serving(item: EmbeddingInput) -> object:
    engine = Engine.__new__(Engine)
    engine.limits = type("All", (), {"check": lambda self, item: None})()  # type: ignore[assignment]
    return engine._look(item)[1]


PLACES: dict[str, Callable[[EmbeddingInput], object]] = {
    "by content": lambda item: content_key(item, by_content),
    "by reference": lambda item: content_key(item, by_reference),
    "training": in_training,
    "encoding": in_encoding,
    "embedding cache": lambda item: InputKeys()(item),
    "indexing": lambda item: _look(item)[0],
    "serving": in_serving,
}


def test_every_field_of_an_input_is_tried() -> None:
    assert set(VALUES) == {part.name for part in dataclasses.fields(EmbeddingInput)}


@pytest.mark.parametrize("key", PLACES.values(), ids=PLACES.keys())
@given(INPUTS, INPUTS)
def test_two_inputs_share_a_key_exactly_if_all_their_fields_are_equal(
    key: Callable[[EmbeddingInput], object], one: EmbeddingInput, other: EmbeddingInput
) -> None:
    assert (key(one) == key(other)) == (one == other)


@pytest.mark.parametrize("key", PLACES.values(), ids=PLACES.keys())
def test_two_videos_have_two_keys(key: Callable[[EmbeddingInput], object], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(name.encode())
    videos = [*FILMS, *(VideoRef.of(tmp_path / f"{name}.mp4") for name in ("a", "b"))]
    assert len({key(EmbeddingInput("what happens?", video=video)) for video in videos}) == len(videos)


def test_a_moved_file_keeps_its_key_by_content_and_no_file_is_opened_by_reference(tmp_path: Path) -> None:
    items = []
    for name in ("here.mp4", "there.mp4"):
        (tmp_path / name).write_bytes(b"the same film")
        items.append(EmbeddingInput(video=VideoRef.of(tmp_path / name)))
    assert len({content_key(item) for item in items}) == 1
    gone = EmbeddingInput(images=(ImageRef("gone.png"),), video=VideoRef("gone.mp4"))
    assert len({content_key(item, by_reference) for item in (*items, gone)}) == 3


def test_the_feature_store_tells_two_videos_apart(tiny_vlm: Callable[[str], Path]) -> None:  # noqa: F811
    backbone = Embedder.from_pretrained(tiny_vlm("qwen2_vl"), dtype=torch.float32).backbone
    frames = [ImageRef.of(draw_image(56, 56, seed)) for seed in range(3)]
    videos = [VideoRef(frames=(frames[0], frames[1])), VideoRef(frames=(frames[0], frames[2]))]
    items = [EmbeddingInput("a", video=videos[0]), EmbeddingInput("a", video=videos[1])]
    keys = row_keys(backbone.process([*items, EmbeddingInput("b", video=videos[0])]))
    assert keys[0] == keys[2] != keys[1]
