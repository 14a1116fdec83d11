"""TIFF images with 16 bits per colour channel: the contrast of the values that are used, whatever Pillow keeps."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vlm2vec import UserError
from vlm2vec.media.images import ImageRef

DEFLATE, MAX_SAMPLE_VALUE, EXTRA_SAMPLES = 8, 281, 338
RAMP = np.linspace(0, 1, 48).reshape(4, 4, 3)


def tiff(
    values: np.ndarray, order: str = "<", deflate: bool = False, photometric: int = 2, **tags: tuple[int, ...]
) -> bytes:
    """A file of 16 bits per channel, in one strip, written by the TIFF specification."""
    height, width, channels = values.shape
    separate = tags.get("tag_284") == (2,)
    planes = np.moveaxis(values, -1, 0) if separate else values[None]
    strips = [plane.astype(f"{order}u2").tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    begins = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    entries: dict[int, tuple[int, ...]] = {
        256: (width,), 257: (height,), 258: (16,) * channels, 259: (DEFLATE if deflate else 1,), 262: (photometric,),
        273: tuple(begins), 277: (channels,), 278: (height,), 279: tuple(map(len, strips)),
    }  # fmt: skip
    entries |= {int(name.removeprefix("tag_")): value for name, value in tags.items()}
    place = 8 + sum(map(len, strips))
    after = place + 2 + 12 * len(entries) + 4
    directory, extra = struct.pack(f"{order}H", len(entries)), b""
    for tag, numbers in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        held = packed if len(packed) == 4 else struct.pack(f"{order}I", after + len(extra))
        extra += b"" if len(packed) == 4 else packed
        directory += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + held
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, place)
    return head + b"".join(strips) + directory + struct.pack(f"{order}I", 0) + extra


def loaded(content: bytes) -> np.ndarray:
    return np.asarray(ImageRef(data=content).load())


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_colours_of_fewer_bits_than_16_keep_their_contrast(bits: int, order: str, deflate: bool) -> None:
    values = np.rint(RAMP * (2**bits - 1))
    found = loaded(tiff(values, order, deflate))
    np.testing.assert_allclose(found, RAMP * 255, atol=1)
    assert found.max() == 255 and found.min() == 0


def test_a_declared_white_scales_values_that_use_more_bits() -> None:
    values = np.rint(RAMP * (2**14 - 1))
    declared = loaded(tiff(values, **{f"tag_{MAX_SAMPLE_VALUE}": (2**14 - 1,) * 3}))
    np.testing.assert_allclose(declared, RAMP * 255, atol=1)
    np.testing.assert_allclose(loaded(tiff(values)), RAMP * 255 / 4, atol=1)  # not declared: of 16 bits


def test_an_opened_image_has_the_contrast_of_its_file() -> None:
    content = tiff(np.rint(RAMP * 4095))
    with Image.open(io.BytesIO(content)) as opened:
        np.testing.assert_array_equal(np.asarray(ImageRef.of(opened).load()), loaded(content))


def test_opacity_and_ink_are_scaled_by_their_own_range() -> None:
    opacity = np.full((4, 4, 1), 65535.0)
    opacity[0, 0] = 0
    found = loaded(tiff(np.concatenate([np.rint(RAMP * 4095), opacity], axis=-1)))
    assert found[0, 0].tolist() == [255, 255, 255]
    np.testing.assert_allclose(found[1:], RAMP[1:] * 255, atol=1)
    ink = np.zeros((4, 4, 4))
    ink[:, :2, 3] = 4095  # black of 12 bits
    assert loaded(tiff(ink, photometric=5)).mean(axis=(0, 2)).tolist() == [0, 0, 255, 255]


def test_black_stays_black() -> None:
    assert loaded(tiff(np.zeros((4, 4, 3)))).max() == 0


def test_what_pillow_cannot_split_is_refused_by_its_layout() -> None:
    multiplied = tiff(np.rint(np.full((4, 4, 4), 0.5) * 4095), **{f"tag_{EXTRA_SAMPLES}": (1,)})
    with pytest.raises(UserError, match="premultiplied colours of 16 bits"):
        loaded(multiplied)
    with pytest.raises(UserError, match="16 bits per channel in separate planes are not supported"):
        loaded(tiff(RAMP * 65535, tag_284=(2,)))
