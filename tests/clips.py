"""Small video files shared by several test modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def colour_of(i: int) -> np.ndarray:
    """Of frame i: no two of the first 30 are alike."""
    return np.array([i * 8, 255 - i * 8, i * 4], dtype=np.uint8)


def write_video(path: Path, num_frames: int = 20, codec: str = "mpeg4", gop: int = 7, fps: int = 10) -> Path:
    """A file whose frames have one colour each, below a grey half."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", gop
        stream.bit_rate = 8_000_000  # so that colours last
        for i in range(num_frames):
            pixels = np.full((48, 64, 3), 128, dtype=np.uint8)
            pixels[24:] = colour_of(i)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
