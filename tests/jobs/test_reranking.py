"""The second stage of a search: rows are scored with the query; unreadable rows are left out and reported."""

from __future__ import annotations

import json
import math
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
from vlm2vec.models.reranking.prompt import RerankPrompt
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
        **options: Any,
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


SMALL = ["--option", "num_layers=1", "--option", "visual_tokens=4", "--option", "image_size=64"]


def test_search_adds_the_weighted_cosine_and_prints_the_sum(
    tiny_vlm: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight 0 is the order without the option, a large one that of the store, and each score is the sum."""
    for number, name in enumerate(("green", "red", "blue", "yellow")):
        draw(tmp_path / f"photos/{name}.png", name, number)
    store = str(tmp_path / "photos.lance")
    run("index", "compact", str(tmp_path / "photos"), "--store", store, *SMALL)
    load, prompt = Reranker.from_pretrained, RerankPrompt(system="Judge.", answers=("y", "n"))
    monkeypatch.setattr(Reranker, "from_pretrained", lambda source, **options: load(source, prompt=prompt, **options))
    search = ["search", "something red", "--store", store, "--json"]
    cosines = {hit["key"]: hit["score"] for hit in json.loads(run(*search))}
    search += ["--rerank", str(tiny_vlm("qwen2_vl"))]
    alone = {hit["key"]: hit["score"] for hit in json.loads(run(*search))}
    assert json.loads(run(*search, "--rerank-cosine", "0")) == json.loads(run(*search))
    for weight in (3.0, 1e6):
        found = {hit["key"]: hit["score"] for hit in json.loads(run(*search, "--rerank-cosine", str(weight)))}
        sums = {key: math.log(alone[key] / (1 - alone[key])) + weight * cosines[key] for key in cosines}
        assert found == pytest.approx(sums, abs=2e-5 * weight) and len(found) == 4
        assert list(found) == sorted(found, key=lambda key: -found[key])
    assert list(found) == list(cosines)
    best = run(*search[:-3], *search[-2:], "--rerank-top", "1", "--rerank-cosine", "20", "-k", "1")
    assert next(iter(cosines)) in best  # of one row that is read, that row


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["search", "red", "--store", "any.lance", "--rerank-cosine", "20"], "add --rerank MODEL"),
        (
            ["search", "red", "--rerank", "m", "--store", "any.lance", "--rerank-cosine", "-1"],
            "cosine -1: expected 0",
        ),
        (
            ["search", "red", "--rerank", "m", "--store", "any.lance", "--rerank-cosine", "nan"],
            "cosine nan: expected 0",
        ),
        (["eval", "compact", "--benchmark", "mmeb-v1", "-o", "out", "--rerank-cosine", "20"], "add --rerank MODEL"),
        (["ui", "--rerank-cosine", "20"], "add --rerank MODEL"),
        (["serve", "compact", "--rerank-cosine", "20"], "add --reranker MODEL"),
    ],
)
def test_a_weight_that_has_no_effect_is_refused_before_anything_is_loaded(command: list[str], message: str) -> None:
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)


def run(*command: str) -> str:
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_ranks_a_folder_and_names_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("green", "red"):
        draw(tmp_path / f"{name}.png", name, 0)
    (tmp_path / "broken.png").write_bytes(b"no image")
    monkeypatch.setattr(Reranker, "from_pretrained", lambda source, **options: Redness())
    done = CliRunner().invoke(app, ["rerank", "any", str(tmp_path), "--query", "red", "--json"])
    found = json.loads(done.stdout)
    assert [row["key"] for row in found["results"]] == ["red.png", "green.png"]
    assert len(found["errors"]) == 1 and "broken.png" in found["errors"][0]
