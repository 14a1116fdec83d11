"""Every snippet of the page about agents and frameworks runs unchanged, with the real library."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from samples import draw
from tiny.fixtures import tiny_vlm  # noqa: F401

from vlm2vec import Embedder
from vlm2vec.cli import app
from vlm2vec.serving.app import create_app
from vlm2vec.serving.settings import ServeSettings

PAGE = Path(__file__).parents[2] / "docs/guides/agents.md"
TEXT = PAGE.read_text()
SMALL: dict[str, Any] = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}


def snippet_of(heading: str) -> str:
    """The Python block below a heading of the page."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(block)


def run(snippet: str) -> None:
    exec(compile(snippet, str(PAGE), "exec", dont_inherit=True), {"__name__": "snippet"})


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the two photographs that the page names."""
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "photos/dog.jpg", "red", 1)
    draw(tmp_path / "photos/street.jpg", "blue", 2)
    return tmp_path / "photos"


def test_every_row_of_the_table_leads_to_a_snippet() -> None:
    rows = re.findall(r"^\| [^|]+ \| \[[^\]]+\]\(([^)]+)\)", TEXT, re.MULTILINE)
    headings = {heading.lower().replace(" ", "-"): heading for heading in re.findall(r"^## (.+)$", TEXT, re.MULTILINE)}
    assert len(rows) == 7
    for row in rows:
        assert snippet_of(headings[row.removeprefix("#")])


@pytest.mark.parametrize("heading", ["LangChain", "LlamaIndex", "Haystack", "LanceDB"])
@pytest.mark.usefixtures("photos")
def test_a_snippet_of_an_adapter_runs(
    heading: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = Embedder.from_pretrained

    def small(name: Any, **_: Any) -> Embedder:
        assert name == "compact"
        return usual("compact", **SMALL)

    monkeypatch.setattr(Embedder, "from_pretrained", small)
    run(snippet_of(heading))
    assert capsys.readouterr().out.strip() in ("a dog on the beach", "a red car", "photos/dog.jpg", "photos/street.jpg")


@pytest.mark.usefixtures("photos")
def test_the_snippet_of_sentence_transformers_runs(
    tiny_vlm: Any,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Embedder.from_pretrained(tiny_vlm("llava"), dtype=torch.float32, device="cpu").save_pretrained(
        tmp_path / "runs/mine"
    )
    run(snippet_of("sentence-transformers"))
    assert capsys.readouterr().out.strip() == "torch.Size([2, 2])"


@pytest.fixture
def port() -> Iterator[int]:
    """Port of a server with the built-in model in its smallest size."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    made = create_app(Embedder.from_pretrained("compact", **SMALL), ServeSettings(model="compact"))
    server = uvicorn.Server(uvicorn.Config(made, port=number, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield number
    server.should_exit = True
    thread.join()


def test_the_snippet_of_openai_and_cohere_runs(port: int) -> None:
    """In a process of its own, since the snippet leaves its connections to the end of the process."""
    snippet = snippet_of("OpenAI and Cohere").replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    ran = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["2", "2"], ran.stderr


@pytest.mark.slow
def test_the_exchange_of_the_agent_runs_and_shows_an_image(photos: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    model = Embedder.from_pretrained("compact", **SMALL).save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(app, ["index", str(model), str(photos), "--store", "photos.lance"])
    assert done.exit_code == 0, done.output
    # The client starts `vlm2vec` with few variables, so the program itself names this checkout.
    program = tmp_path / "bin/vlm2vec"
    program.parent.mkdir()
    paths = os.pathsep.join(path for path in sys.path if path)
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{paths}" HF_HUB_OFFLINE=1 exec "{sys.executable}" -m vlm2vec "$@"\n')
    program.chmod(0o755)
    (tmp_path / "exchange.py").write_text(snippet_of("Agents"))
    env = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": paths}
    ran = subprocess.run([sys.executable, "exchange.py"], env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found, shown, _, wrong = ran.stdout.splitlines()
    assert "dog.jpg" in found and "street.jpg" in found and shown.startswith("image image/jpeg ")
    assert wrong.startswith("True Error executing tool search: filter 'size > 3': No field named size")
