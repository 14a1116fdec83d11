from __future__ import annotations

import base64
import io
from collections import UserDict, deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny.models import draw_image

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.types import EmbeddingInput, require_many


def png() -> bytes:
    encoded = io.BytesIO()
    draw_image(8, 6, 0).save(encoded, format="PNG")
    return encoded.getvalue()


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Batches with one packed tensor; lengths and padding sides are arbitrary."""
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))
    lengths = draw(st.lists(st.integers(1, 5), min_size=len(counts), max_size=len(counts)))
    left = draw(st.booleans())
    ids = torch.zeros(len(counts), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        columns = slice(max(lengths) - length, None) if left else slice(0, length)
        ids[i, columns] = torch.arange(1, length + 1) + 10 * i
        mask[i, columns] = 1
    pixels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).float().unsqueeze(1)
    return Batch({"input_ids": ids, "attention_mask": mask, "pixels": pixels}, {"pixels": torch.tensor(counts)})


@given(batches(), st.data())
def test_a_slice_holds_the_packed_rows_of_its_own_examples(batch, data):
    start = data.draw(st.integers(0, len(batch) - 1))
    stop = data.draw(st.integers(start + 1, len(batch)))
    part = batch.slice(start, stop)
    assert len(part) == stop - start
    owners = [i for i in range(start, stop) for _ in range(int(batch.rows["pixels"][i]))]
    assert part["pixels"].flatten().tolist() == owners
    assert torch.equal(part.rows["pixels"], batch.rows["pixels"][start:stop])


@given(batches(), st.integers(1, 7))
def test_splitting_keeps_every_token_and_row_in_order_and_trims_padding(batch, chunk_size):
    parts = list(batch.split(chunk_size))
    assert [len(part) for part in parts[:-1]] == [chunk_size] * (len(parts) - 1)
    assert torch.equal(torch.cat([part["pixels"] for part in parts]), batch["pixels"])
    tokens = [part["input_ids"][part["attention_mask"].bool()] for part in parts]
    assert torch.equal(torch.cat(tokens), batch["input_ids"][batch["attention_mask"].bool()])
    for part in parts:
        columns = part["attention_mask"].any(dim=0)
        assert columns[0] and columns[-1]


@given(batches(), st.data())
def test_a_slice_of_a_slice_is_the_slice(batch, data):
    start = data.draw(st.integers(0, len(batch) - 1))
    once = batch.slice(start, len(batch)).slice(0, 1)
    direct = batch.slice(start, start + 1)
    assert all(torch.equal(once[name], direct[name]) for name in direct.tensors)


def test_slicing_leaves_the_batch_as_it_was():
    ids = torch.tensor([[1, 0, 0], [1, 2, 3]])
    batch = Batch({"input_ids": ids.clone(), "attention_mask": (ids > 0).long()})
    assert batch.slice(0, 1)["input_ids"].shape == (1, 1)
    assert torch.equal(batch["input_ids"], ids)


def test_an_input_is_made_of_what_users_pass(tmp_path):
    reference = ImageRef(path="a.png")
    assert EmbeddingInput.of("text", "do") == EmbeddingInput("text", (), "do")
    assert EmbeddingInput.of(Path("a.png")) == EmbeddingInput(None, (reference,))
    assert EmbeddingInput.of({"image": "a.png", "text": "t"}) == EmbeddingInput("t", (reference,))
    assert EmbeddingInput.of({"images": ["a.png", None, "a.png"]}) == EmbeddingInput(None, (reference, reference))
    assert EmbeddingInput.of({"text": "t", "instruction": "own"}, "other").instruction == "own"
    given_input = EmbeddingInput("text")
    assert EmbeddingInput.of(given_input, "other") is given_input


def test_images_come_from_files_bytes_data_uris_and_pil():
    image = draw_image(8, 6, 0)
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    for source in (image, png(), uri):
        assert EmbeddingInput.of({"image": source}).images[0].load().tobytes() == image.tobytes()


def test_a_photograph_taken_upright_is_turned_as_its_exif_data_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    encoded = io.BytesIO()
    draw_image(8, 6, 0).save(encoded, format="PNG", exif=exif)
    turned = draw_image(8, 6, 0).transpose(Image.Transpose.ROTATE_270)
    assert ImageRef.of(encoded.getvalue()).load().tobytes() == turned.tobytes()


def test_a_image_of_sixteen_bits_keeps_its_greys():
    encoded = io.BytesIO()
    Image.frombytes("I;16", (2, 2), bytes([0, 0, 0x40, 0x40, 0x80, 0x80, 0xFF, 0xFF])).save(encoded, format="PNG")
    assert list(ImageRef.of(encoded.getvalue()).load().tobytes()[::3]) == [0, 64, 128, 255]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"txt": "a"}, "unknown keys"),
        ({}, "input is empty"),
        ({"image": None}, "input is empty"),
        ({"image": 7}, "type int"),
        (7, "type int"),
        ({"image": "https://example.org/a.png"}, "URLs are not fetched"),
        ({"image": "data:image/png"}, "expected data:image"),
        ({"image": "data:image/png;base64,a!b"}, "expected data:image"),
    ],
)
def test_an_input_that_cannot_be_made_is_one_clear_line(value, words):
    with pytest.raises(UserError, match=words) as caught:
        EmbeddingInput.of(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "missing"), (png()[:-30], "not a readable"), (b"x", "not a readable")]
)
def test_a_image_that_cannot_be_read_is_one_clear_line_that_names_it(tmp_path, content, words):
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    reference = ImageRef(path=str(path), origin="rows.jsonl, row 3")
    with pytest.raises(UserError, match=words) as caught:
        reference.load()
    assert "rows.jsonl, row 3" in str(caught.value) and "broken.png" in str(caught.value)
    assert "\n" not in str(caught.value)


class Frame:
    """Iterates over names of columns, as a table of pandas does."""

    columns = ("text",)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (None, "None of type NoneType"),
        (7, "7 of type int"),
        ("a text", "a text of type str"),
        (b"bytes", "of type bytes"),
        (Path("a.png"), "a.png of type PosixPath"),
        (Image.new("RGB", (2, 2)), "of type Image"),
        (EmbeddingInput("a"), "of type EmbeddingInput"),
        (UserDict(text="a"), "of type UserDict"),
        (Frame(), "a Frame; pass one of its columns"),
    ],
)
def test_a_single_input_or_a_table_in_place_of_a_list_is_one_line(values: object, found: str) -> None:
    with pytest.raises(UserError, match=r"^encode expects a list of inputs, found") as error:
        require_many(values, "encode")
    assert found in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("values", [[], ("a",), np.array(["a"]), iter(["a"]), {"a": 1}.keys(), deque(["a"])])
def test_any_iterable_of_inputs_is_accepted(values: object) -> None:
    require_many(values, "encode")
