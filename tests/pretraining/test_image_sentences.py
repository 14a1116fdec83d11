from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from pretraining.image_sentences import found, train, write
from pretraining.photographs import LICENSED, Figure, free_commit, main, read_photograph, texts_of
from vlm2vec.errors import UserError
from vlm2vec.models.backbones.compact.model import Bypass
from vlm2vec.models.backbones.compact.parts import FINAL_DIM, VISION_DIM
from vlm2vec.models.backbones.compact.seen_classes import SeenClasses

NOISE = np.random.default_rng(0)


def git(clone: Path, *arguments: str) -> None:
    command = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    subprocess.run(command, check=True, capture_output=True)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def page(*figures: tuple[str, str, str]) -> str:
    return "".join(
        f'<figure id="f"><media id="m" alt="{alt}"><image src="../../media/{name}"/></media>'
        f"<caption>{caption}</caption></figure>"
        for name, alt, caption in figures
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A book of one photograph under CC BY, and another that came with its change to CC BY-NC-SA."""
    book = tmp_path / "clones/osbooks-toy"
    (book / "modules").mkdir(parents=True)
    git(book, "init", "-q")
    photo = NOISE.integers(0, 200, (200, 300, 3))
    white = np.full((200, 300, 3), 255)
    for name, pixels in (("a.png", photo), ("b.png", photo // 2), ("c.png", white), ("d.png", photo // 3)):
        save(book / "media" / name, pixels)
    (book / "LICENSE").write_bytes(LICENSED)
    (book / "modules/index.cnxml").write_text(
        page(
            ("a.png", "A photo of two dogs on a <emphasis>beach</emphasis>.", "Dogs run. They do. (credit: X)"),
            ("b.png", "A graph of sales by year is shown.", ""),
            ("c.png", "A photo of nothing but white paper.", ""),
            ("d.png", "A photo of a cat on a sofa.", "A cat (credit: Y, CC BY-NC 2.0)"),
            ("missing.png", "A photo of a bird in the sky.", ""),
        )
    )
    git(book, "add", "."), git(book, "commit", "-qm", "free")
    (book / "LICENSE").write_text("Attribution-NonCommercial-ShareAlike 4.0 International")
    (book / "modules/more.cnxml").write_text(page(("b.png", "A photo of a horse in a field.", "")))
    git(book, "add", "."), git(book, "commit", "-qm", "not free")
    return book


def test_the_free_photographs_of_the_last_free_commit_are_written(clone: Path, tmp_path: Path) -> None:
    main(str(clone.parent), str(tmp_path / "photographs"))
    rows = [json.loads(line) for line in (tmp_path / "photographs/photographs.jsonl").read_text().splitlines()]
    assert [row["texts"] for row in rows] == [["Two dogs on a beach", "Two dogs on a beach", "Dogs run."]]
    assert rows[0]["book"] == "osbooks-toy" and rows[0]["commit"] == free_commit(clone)
    with Image.open(tmp_path / "photographs" / rows[0]["image"]) as image:
        assert image.size == (300, 200)


def test_a_book_without_a_free_commit_is_one_clear_line(clone: Path) -> None:
    subprocess.run(["git", "-C", str(clone), "checkout", "-q", "--orphan", "x"], check=True)
    git(clone, "commit", "-qm", "all")
    with pytest.raises(UserError, match="osbooks-toy: no commit of this clone is under CC BY 4"):
        free_commit(clone)


def test_a_description_loses_its_lead_and_a_caption_its_credit() -> None:
    figure = Figure("x", "The photograph shows a man (a) and a dog. They run.", "Friends run. (credit: Ann/Flickr)")
    assert texts_of(figure) == ["A man and a dog. They run", "A man and a dog.", "Friends run."]


def test_what_is_no_image_or_a_tiny_one_is_no_photograph(tmp_path: Path) -> None:
    assert read_photograph(b"no image") is None
    save(tmp_path / "media/tiny.png", NOISE.integers(0, 200, (100, 300, 3)))
    assert read_photograph((tmp_path / "media/tiny.png").read_bytes()) is None


def test_training_brings_images_near_their_texts_and_what_is_written_reads_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = torch.nn.Linear(FINAL_DIM, 6)
    kinds, direction = torch.randn(40, FINAL_DIM), torch.randn(FINAL_DIM, 384)
    features = kinds.repeat(6, 1).unsqueeze(1).repeat(1, 2, 1) + 0.3 * torch.randn(240, 2, FINAL_DIM)
    texts_ND = F.normalize(F.layer_norm(kinds, (FINAL_DIM,)) @ direction, dim=-1)
    texts = [text.unsqueeze(0) for text in texts_ND.repeat(6, 1)]
    bypass = Bypass(SeenClasses(classifier, F.normalize(torch.randn(6, 384), dim=-1)), dropout=0.1)
    shown = torch.cat([features, torch.zeros(240, 2, VISION_DIM - FINAL_DIM)], dim=-1)
    before = found(bypass.eval(), shown[:40], texts_ND)["hit@1"]
    losses = train(bypass.train(), shown[40:], texts[40:])
    assert losses[-1] < 0.5 * losses[0] and not bypass.training
    assert found(bypass, shown[:40], texts_ND)["hit@1"] > max(60, 3 * before)
    assert len(write(bypass, tmp_path / "x.safetensors")) == 64
    saved = load_file(tmp_path / "x.safetensors")
    again = Bypass(SeenClasses(classifier, saved["class_sentences.vectors_CD"].float()))
    again.load_state_dict({name: value.float() for name, value in saved.items()})
    torch.testing.assert_close(again(shown[:5]), bypass(shown[:5]), rtol=0, atol=5e-3)
