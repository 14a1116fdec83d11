"""Every mode that Pillow writes keeps its contrast or is rejected; of EXIF, only the orientation is used."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.media.pixels import PixelRules, prepare, to_rgb

RAMP = np.tile(np.arange(256, dtype=np.uint8), (8, 1))
GREY = Image.fromarray(RAMP)
WIDE = (RAMP.astype(np.uint16) * 257).astype("<u2")
MODES: dict[str, Callable[[], Image.Image]] = {
    **{mode: lambda mode=mode: GREY.convert(mode) for mode in ("L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")},
    **{mode: lambda mode=mode: GREY.convert(mode) for mode in ("I", "F", "I;16")},
    **{mode: lambda mode=mode: GREY.convert("RGB").convert(mode) for mode in ("HSV", "RGBX", "LAB")},
    "La": lambda: GREY.convert("LA").convert("La"),
    "RGBa": lambda: GREY.convert("RGBA").convert("RGBa"),
    "PA": lambda: GREY.convert("P").convert("PA"),
    "I;16 full range": lambda: Image.fromarray(WIDE),
    "I;16B full range": lambda: Image.frombytes("I;16B", (256, 8), WIDE.astype(">u2").tobytes()),
    "I full range": lambda: Image.fromarray(WIDE.astype(np.int32)),
    "F full range": lambda: Image.fromarray(WIDE.astype(np.float32)),
    "F 0 to 1": lambda: Image.fromarray(RAMP.astype(np.float32) / 255),
}


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_any_mode_keeps_its_contrast_or_is_refused_by_mode(mode: str) -> None:
    try:
        seen = np.asarray(to_rgb(MODES[mode]()))
    except UserError as error:
        assert mode == "LAB" and "mode LAB is not supported" in str(error)
        return
    assert seen.shape == (8, 256, 3)
    assert np.abs(seen[..., 1].astype(int) - RAMP).max() <= 2


def saved(image: Image.Image, kind: str, **options: object) -> ImageRef:
    output = io.BytesIO()
    image.save(output, format=kind, **options)
    return ImageRef.of(output.getvalue())


FORMATS = {
    "PNG": ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "I", "I;16", "F", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
}


@given(st.sampled_from([(kind, mode) for kind, modes in FORMATS.items() for mode in modes]), st.data())
def test_a_saved_image_is_loaded_with_the_contrast_of_the_source_or_refused(case: tuple[str, str], data: st.DataObject):
    kind, mode = case
    dark, bright = data.draw(st.tuples(st.integers(0, 60), st.integers(195, 255)))
    grey = Image.fromarray(np.repeat(np.array([dark, bright], np.uint8), 32).reshape(2, 32).repeat(16, axis=0))
    source = grey.convert("RGB").convert("LAB") if mode == "LAB" else grey.convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {}
    try:
        seen = np.asarray(saved(source, kind, **options).load().convert("L")).astype(int)
    except UserError as error:
        assert "mode LAB" in str(error)
        return
    assert seen[-1].mean() - seen[0].mean() >= 100


def test_a_transparent_value_of_16_bit_grey_is_white_and_the_rest_keeps_its_contrast() -> None:
    seen = np.asarray(saved(Image.fromarray(WIDE), "PNG", transparency=0).load())
    assert len(np.unique(seen)) >= 255 and (seen[:, 0] == 255).all()


WIDE_GREY = RAMP.astype(np.int64)
TAGGED: dict[str, tuple[np.ndarray, dict[int, object]]] = {
    "white is 0": (65535 - WIDE, {262: 0}),
    "white is 0, floats": ((1 - RAMP / 255).astype("<f4"), {262: 0}),
    "10 of 16 bits": ((WIDE_GREY * 4 + WIDE_GREY // 64).astype("<u2"), {}),
    "12 of 16 bits": ((WIDE_GREY * 16 + WIDE_GREY // 16).astype("<u2"), {}),
    "14 of 16 bits, highest value stated": ((WIDE_GREY * 64).astype("<u2"), {281: 16383}),
    "signed, 16 bits": ((WIDE // 2).astype("<i2"), {339: 2}),
    "signed, 8 bits": ((RAMP // 2).astype("i1"), {339: 2}),
    "12 bits as floats": ((WIDE_GREY * 16 + WIDE_GREY // 16).astype("<f4"), {}),
}


def tiff(values: np.ndarray, tags: dict[int, object]) -> ImageRef:
    """An uncompressed grey TIFF with the given values and tags; Pillow does not write these kinds itself."""
    height, width = values.shape
    kind, data = {"u": 1, "i": 2, "f": 3}[values.dtype.kind], values.tobytes()
    bits = 8 * values.itemsize
    plain = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 277: 1, 278: height, 279: len(data), 339: kind}
    entries = {**plain, **tags, 273: 8 + 2 + 12 * len({**plain, **tags, 273: 0}) + 4}
    body = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in sorted(entries.items()))
    return ImageRef.of(b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + b"\0\0\0\0" + data)


@pytest.mark.parametrize("kind", TAGGED)
def test_a_tiff_is_scaled_by_its_tags_or_by_the_bits_that_it_uses(kind: str) -> None:
    seen = np.asarray(tiff(*TAGGED[kind]).load())
    assert np.abs(seen[..., 1].astype(int) - RAMP).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_an_opened_image_is_turned_as_its_file_is(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8))
    file = saved(noise, kind, exif=exif)
    with Image.open(io.BytesIO(file.read())) as image:
        for opened in (image.convert("RGB") if kind != "TIFF" else image, image):
            assert (np.asarray(ImageRef.of(opened).load()) == np.asarray(file.load())).all()
    assert file.load().size == (6, 9)


@pytest.mark.parametrize("kind", ["EPS", "WMF", "GRIB", "MPEG"])
def test_a_format_that_pillow_does_not_decode_itself_is_refused_by_its_name(kind: str) -> None:
    content = {
        "EPS": saved(Image.new("RGB", (4, 4)), "EPS").read(),
        "WMF": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 100, 100, 100) + b"\0" * 6 + b"\x01\0\x09\0\0\x03",
        "GRIB": b"GRIB\0\0\0\1" + bytes(40),
        "MPEG": b"\0\0\1\xb3\x02\0\x20" + bytes(40),
    }[kind]
    with pytest.raises(UserError, match=f"format {kind} is not supported; convert the image to PNG or JPEG"):
        ImageRef(data=content).load()
    with Image.open(io.BytesIO(content)) as opened, pytest.raises(UserError, match=f"format {kind} is not supported"):
        ImageRef.of(opened)


def test_an_opened_image_without_pixels_is_refused() -> None:
    half = saved(Image.effect_noise((64, 64), 50), "PNG").read()[:600]
    for image in (Image.new("RGB", (0, 0)), Image.open(io.BytesIO(half))):
        with pytest.raises(UserError, match="not a readable image"):
            ImageRef.of(image)


@given(st.sampled_from([-1.0, 1.2, 70000.0, float("nan")]))
def test_a_range_without_a_known_white_is_refused(value: float) -> None:
    with pytest.raises(UserError, match="mode F with values from"):
        to_rgb(Image.fromarray(np.full((2, 2), value, np.float32)))


def with_exif(tag: int, kind: int, count: int, value: bytes, orientation: int = 6) -> bytes:
    """A JPEG of 60 x 90 whose EXIF data holds an orientation and one more entry."""
    output = io.BytesIO()
    Image.new("RGB", (60, 90), "red").save(output, "JPEG")
    first = struct.pack(">HHI", 0x0112, 3, 1) + struct.pack(">H", orientation) + b"\0\0"
    place = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(">I", 38)
    entries = struct.pack(">H", 2) + first + struct.pack(">HHI", tag, kind, count) + place + b"\0\0\0\0"
    raw = b"Exif\0\0MM\0*\0\0\0\x08" + entries + (value if len(value) > 4 else b"")
    jpeg = output.getvalue()
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(raw) + 2) + raw + jpeg[2:]


ODD_ENTRIES = {
    "resolution -1/0": (0x011A, 10, 1, struct.pack(">ii", -1, 0)),
    "resolution of undefined type": (0x011A, 7, 8, b"abcdefgh"),
    "unit as text": (0x0128, 2, 6, b"inches"),
    "negative short": (0x0128, 8, 1, struct.pack(">h", -5)),
    "pointer beyond the end": (0x8769, 4, 1, struct.pack(">I", 99999)),
    "unknown type": (0x0131, 99, 1, b"ab"),
}


@pytest.mark.parametrize("entry", ODD_ENTRIES)
def test_an_odd_exif_entry_does_not_keep_a_photograph_from_being_turned(entry: str) -> None:
    assert ImageRef.of(with_exif(*ODD_ENTRIES[entry])).load().size == (90, 60)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of what it cannot read
@given(st.integers(0, 0xFFFF), st.integers(1, 13), st.binary(min_size=1, max_size=12))
def test_no_exif_entry_makes_a_photograph_unreadable(tag: int, kind: int, value: bytes) -> None:
    assert set(ImageRef.of(with_exif(tag, kind, len(value), value)).load().size) == {60, 90}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    assert (np.asarray(ImageRef(path=str(tmp_path / "a.png")).load()) == wanted).all()
    as_published = ImageRef(path=str(tmp_path / "a.png"), rules=PixelRules(plain=True))
    assert (np.asarray(as_published.load()) == noise).all()


# Sizes and results as recorded from the reference evaluation (tests/golden/mmeb/_grids.json), before the processor.
@pytest.mark.parametrize(
    ("size", "image", "frame"),
    [
        ((640, 480), (640, 480), (640, 480)),
        ((27, 200), (56, 56), (200, 200)),
        ((13, 9), (56, 56), (13, 13)),
        ((30, 6100), (980, 980), (30, 6100)),
        ((4500, 30), (4500, 30), (4500, 30)),
    ],
)
def test_small_and_long_images_have_the_published_sizes(
    size: tuple[int, int], image: tuple[int, int], frame: tuple[int, int]
) -> None:
    picture = Image.new("RGB", size)
    assert prepare(picture, PixelRules(small_images=True)).size == image
    assert prepare(picture, PixelRules(small_frames=True)).size == frame
    assert prepare(picture).size == size
    assert prepare(picture, PixelRules(squash=1344)).size == (1344, 1344)


def test_alpha_is_dropped_16_bits_are_clipped_and_pages_are_compressed_as_published() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert prepare(clear, PixelRules(plain=True)).getpixel((0, 0)) == (10, 20, 30)
    assert prepare(clear).getpixel((0, 0)) == (255, 255, 255)
    wide = Image.fromarray(np.full((4, 4), 30000, np.uint16))
    assert prepare(wide, PixelRules(plain=True)).getpixel((0, 0)) == (255, 255, 255)
    assert prepare(wide).getpixel((0, 0)) == (117, 117, 117)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (16, 16, 3), np.uint8))
    output = io.BytesIO()
    noise.save(output, "JPEG")
    with Image.open(output) as lossy:
        assert (np.asarray(prepare(noise, PixelRules(jpeg=True))) == np.asarray(lossy)).all()


def test_rules_are_part_of_the_digest_and_frames_are_shrunk_to_their_budget() -> None:
    data = saved(Image.new("RGB", (400, 200)), "PNG").read()
    plain = ImageRef(data=data)
    ruled = ImageRef(data=data, rules=PixelRules(max_pixels=20000))
    assert plain.digest() != ruled.digest() and ImageRef(data=data, rules=PixelRules()).digest() == plain.digest()
    assert ruled.load().size == (200, 100)


def test_base64_given_as_a_path_does_not_fill_the_message() -> None:
    with pytest.raises(UserError, match="the image file is missing") as caught:
        ImageRef.of("iVBORw0KGgo" * 100_000).load()
    assert len(str(caught.value)) < 200
    with pytest.raises(UserError, match="not valid; expected data:image") as caught:
        ImageRef.of("data:image/png;base64," + "?" * 100_000)
    assert len(str(caught.value)) < 200
