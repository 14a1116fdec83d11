"""The snippets on the page about frameworks run unchanged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from samples import draw

from vlm2vec import Embedder

PAGE = Path(__file__).parents[2] / "docs/guides/agents.md"
SNIPPETS = [
    block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "integrations" in block
]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["langchain", "llamaindex", "haystack", "lancedb"])
def test_a_snippet_of_the_page_runs(
    snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = Embedder.from_pretrained

    def small(name: Any, **_: Any) -> Embedder:
        assert name == "compact-embed"
        return usual("compact", num_layers=1, visual_tokens=4, image_size=64)

    monkeypatch.setattr(Embedder, "from_pretrained", small)
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "photos/dog.jpg", "red", 1)
    draw(tmp_path / "photos/street.jpg", "blue", 2)
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(snippet, str(PAGE), "exec", dont_inherit=True), names)
    assert capsys.readouterr().out.strip() in ("a dog on the beach", "a red car", "photos/dog.jpg", "photos/street.jpg")
