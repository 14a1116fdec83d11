"""The second stage of a search: rows are scored with the query; unreadable rows are left out and reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from samples import draw
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.errors import UserError
from vlm2vec.jobs.reranking import rerank_hits
from vlm2vec.jobs.searching import Query
from vlm2vec.models.reranking.reranker import Ranked, Reranker
from vlm2vec.retrieval.metadata import own
from vlm2vec.retrieval.vector_store import Hit
from vlm2vec.types import EmbeddingInput


@dataclass
class Redness:
    """Ranks images by how red they are; knows nothing of texts."""

    def rank(
        self,
        query: EmbeddingInput,
        candidates: Sequence[EmbeddingInput],
        on_error: Callable[[int, UserError], None],
        progress: Callable[[int], None] | None = None,
    ) -> list[Ranked]:
        scores = {}
        for index, item in enumerate(candidates):
            try:
                red, green, _ = item.images[0].load().resize((1, 1)).getpixel((0, 0))
                scores[index] = (red - green) / 255
            except UserError as error:
                on_error(index, error)
        return [Ranked(index, scores[index], 0.0) for index in sorted(scores, key=lambda index: -scores[index])]


def hit(path: Path, score: float, **more: Any) -> Hit:
    return Hit(path.name, score, own(path=str(path), kind="image", modality="image", **more))


def test_the_rerankers_order_replaces_that_of_the_cosines(tmp_path: Path) -> None:
    for name in ("green", "red", "blue"):
        draw(tmp_path / f"{name}.png", name, 0)
    hits = [hit(tmp_path / f"{name}.png", score) for name, score in (("green", 0.9), ("red", 0.5), ("gone", 0.4))]
    text = Hit("note.txt", 0.3, own(path="note.txt", kind="text", modality="text"))
    best, skipped = rerank_hits(Redness(), Query("red"), [*hits, text], k=1)
    assert [found.key for found in best] == ["red.png"]
    assert best[0].score > 0.5
    assert len(skipped) == 2
    assert "note.txt: the store keeps no image of this row" in skipped[0]
    assert "gone.png" in skipped[1]


def test_the_command_ranks_a_folder_and_names_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("green", "red"):
        draw(tmp_path / f"{name}.png", name, 0)
    (tmp_path / "broken.png").write_bytes(b"no image")
    monkeypatch.setattr(Reranker, "from_pretrained", lambda source, **options: Redness())
    done = CliRunner().invoke(app, ["rerank", "any", str(tmp_path), "--query", "red", "--json"])
    found = json.loads(done.stdout)
    assert [row["key"] for row in found["results"]] == ["red.png", "green.png"]
    assert len(found["errors"]) == 1 and "broken.png" in found["errors"][0]
