"""Occlusion finds the region that a match depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from samples import draw
from typer.testing import CliRunner

from vlm2vec import EmbeddingInput, UserError
from vlm2vec.cli import app
from vlm2vec.jobs.explaining import explain, overlay
from vlm2vec.media.images import ImageRef

SMALL = ["--option", "num_layers=1", "--option", "visual_tokens=4", "--option", "image_size=64"]


class RedShare:
    """The vector of an image turns with its share of red pixels; a query is "all red"."""

    def encode_query(self, inputs: list[EmbeddingInput], **_: Any) -> np.ndarray:
        return np.array([[1.0, 0.0]] * len(inputs))

    def encode_document(self, inputs: list[EmbeddingInput], **_: Any) -> np.ndarray:
        shares = [(np.asarray(item.images[0].load())[..., :2] == (255, 0)).all(axis=-1).mean() for item in inputs]
        return np.array([[share, (1 - share**2) ** 0.5] for share in shares])


def corner() -> ImageRef:
    """Blue, with red in the cells 0 and 1 of both axes of an 8 x 8 grid."""
    picture = Image.new("RGB", (80, 80), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 20, 20))
    return ImageRef.of(picture)


def test_the_region_that_carries_the_match_is_found() -> None:
    done: list[int] = []
    found = explain(RedShare(), EmbeddingInput("red"), corner(), 8, done.append)
    assert found.cosine == pytest.approx(1 / 16) and sum(done) == 49
    assert np.unravel_index(found.drops_GG.argmax(), (8, 8)) == (0, 0)
    assert found.drops_GG[0, 0] == pytest.approx(1 / 16)  # one window covers this cell: all of the red
    np.testing.assert_allclose(found.drops_GG[3:, 3:], 0, atol=1e-12)
    np.testing.assert_allclose(found.drops_GG, found.drops_GG.T)


def test_the_overlay_is_red_where_the_match_is_and_gray_elsewhere() -> None:
    drops = np.zeros((4, 4))
    drops[0, 0], drops[3, 3] = 0.2, -0.2
    shown = np.asarray(overlay(Image.new("RGB", (80, 80), (128, 128, 128)), drops)).astype(int)
    assert shown[4, 4, 0] > shown[4, 4, 2] + 50 and shown[75, 75, 2] > shown[75, 75, 0] + 50
    assert shown[4, 75].tolist() == [128, 128, 128]


@pytest.mark.parametrize("grid", [1, 33])
def test_a_grid_out_of_range_is_one_line(grid: int) -> None:
    with pytest.raises(UserError, match=f"grid {grid}: expected 2 to 32"):
        explain(RedShare(), EmbeddingInput("red"), corner(), grid)


def test_the_command_writes_a_page_that_stands_alone(tmp_path: Path) -> None:
    draw(tmp_path / "red.png", "red", 0)
    page = tmp_path / "e.html"
    arguments = ["explain", "compact", "--query", "<red>", "--image", str(tmp_path / "red.png"), "-o", str(page)]
    done = CliRunner().invoke(app, [*arguments, "--grid", "3", *SMALL], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert text.count("data:image/webp;base64,") == 2 and "Each of 4 overlapping windows" in text
    assert "http" not in text and "<red>" not in text
