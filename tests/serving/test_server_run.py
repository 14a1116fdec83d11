"""Server start: which model is loaded, in which precision, by which worker."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from starlette.testclient import TestClient
from typer.testing import CliRunner
from wire import post

from vlm2vec import Embedder
from vlm2vec.cli import app
from vlm2vec.errors import UserError
from vlm2vec.jobs.stores import facts_of
from vlm2vec.retrieval.open import open_store
from vlm2vec.serving.app import create_app
from vlm2vec.serving.run import claim_slot, load, serve, worker_app
from vlm2vec.serving.settings import ENVIRONMENT, ServeSettings

pytestmark = pytest.mark.usefixtures("slots")
SMALL = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Release the slots that a test claims."""
    held: list[Any] = []
    monkeypatch.setattr("vlm2vec.serving.run._held", held)
    yield
    for file in held:
        file.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_equal_the_librarys_in_the_chosen_precision(dtype: torch.dtype, png: bytes) -> None:
    name: Any = str(dtype).removeprefix("torch.")
    settings = ServeSettings(model="compact", model_options=SMALL, dtype=name)
    embedder, _ = load(settings)
    assert dtype in {parameter.dtype for parameter in embedder.parameters()}
    inputs = ["a red car", "a dog on the beach, and a cat", "Zürich"]
    with TestClient(create_app(embedder, settings)) as client:
        data = post(client, input=inputs).json()["data"]
    made = torch.tensor([item["embedding"] for item in data])
    want = torch.from_numpy(Embedder.from_pretrained("compact", dtype=dtype, **SMALL).encode(inputs))
    assert (made * want).sum(dim=1).min() >= 0.9999


def test_the_store_sets_precision_and_options_and_contradictions_are_refused(tmp_path: Path) -> None:
    made = Embedder.from_pretrained("compact", dtype=torch.float32, **SMALL)
    uri = str(tmp_path / "texts.lance")
    open_store(uri, facts_of(made, "compact", options=SMALL, dtype=torch.float32)).close()
    embedder, store = load(ServeSettings(model="compact", store=uri))
    assert store is not None and embedder.dtype == torch.float32 and embedder.backbone.options()["num_layers"] == 1
    store.close()
    for other in ({"dtype": "bfloat16"}, {"model_options": {"visual_tokens": 16}}):
        with pytest.raises(UserError, match="cannot be used with compact: another"):
            load(ServeSettings(model="compact", store=uri, **other))


def test_a_store_of_a_pickled_model_is_served_if_pickle_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Embedder.from_pretrained("compact", dtype=torch.float32, **SMALL)
    uri = str(tmp_path / "texts.lance")
    open_store(uri, facts_of(made, "compact", options=SMALL, dtype=torch.float32)).close()
    seen: list[dict[str, Any]] = []

    def loaded(source: str, **settings: Any) -> Embedder:
        seen.append(settings)
        return made

    monkeypatch.setattr(Embedder, "from_pretrained", loaded)
    served: list[ServeSettings] = []
    monkeypatch.setattr("vlm2vec.serving.run.serve", served.append)
    words = ["serve", "compact", "--store", uri, "--allow-pickle", "--option", "num_layers=1", "--device", "cpu"]
    assert CliRunner().invoke(app, words).exit_code == 0
    _, store = load(served[0])
    assert store is not None
    store.close()
    assert seen == [{**SMALL, "dtype": torch.float32, "allow_pickle": True, "device": torch.device("cpu")}]


def test_an_invalid_setting_is_one_line(tmp_path: Path) -> None:
    for words, message in {
        ("--dtype", "int3"): "setting dtype: expected 'auto', 'float32', 'bfloat16' or 'float16'",
        ("--port", "99999"): "setting port: expected 65535 or less",
        ("--limit", "max_char=3"): "setting max_char: unknown setting; did you mean max_chars?",
        ("--api-key-file", str(tmp_path / "none")): "cannot be read",
        ("--media-root", str(tmp_path / "none")): "expected a folder",
    }.items():
        failed = CliRunner().invoke(app, ["serve", "compact", *words])
        assert isinstance(failed.exception, UserError) and message in str(failed.exception)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch_inputs": 64, "max_queue": 32}, "max_batch_inputs is larger than max_queue"),
        ({"max_image_bytes": 2000, "max_body_bytes": 1000}, "max_image_bytes is larger than max_body_bytes"),
        ({"max_chars": 2000, "max_body_bytes": 1000}, "max_chars is larger than max_body_bytes"),
        ({"max_images": 0, "allow_urls": ("example.org",)}, "max_images is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_start(settings: dict[str, Any], message: str) -> None:
    words = [f"--limit={name}={value}" for name, value in settings.items() if name != "allow_urls"]
    words += [f"--allow-urls={host}" for host in settings.get("allow_urls", ())]
    failed = CliRunner().invoke(app, ["serve", "compact", *words])
    assert isinstance(failed.exception, UserError) and message in str(failed.exception)
    for name, value in settings.items():  # each alone is fine: the default of the other gives way
        ServeSettings.model_validate({"model": "compact", name: value})


def test_settings_reach_worker_processes_as_they_were_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "")
    settings = ServeSettings(model="compact", max_queue=8, cors_origins=("https://a.example",))
    settings.to_environment()
    assert ServeSettings.from_environment() == settings


def test_an_address_that_cannot_be_bound_is_refused_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for host, at, reason in (("127.0.0.1", port, "in use"), ("192.0.2.1", 0, "assign"), ("no.such.host", 0, "not")):
            with pytest.raises(UserError, match=f"--host {host} --port {at}: cannot bind to this address .*{reason}"):
                serve(ServeSettings(model="none", host=host, port=at))


def test_workers_that_cannot_load_the_model_stop_the_server_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[Any] = []

    def supervise(app: str, **_: Any) -> None:
        """As uvicorn with two workers does, but in this process."""
        assert app == "vlm2vec.serving.run:worker_app"
        with pytest.raises(SystemExit) as ended:
            worker_app()
        codes.append(ended.value.code)

    monkeypatch.setattr(uvicorn, "run", supervise)
    monkeypatch.setattr("vlm2vec.serving.logs.log_to_stderr", lambda: None)
    for name in (ENVIRONMENT, "PROMETHEUS_MULTIPROC_DIR"):
        monkeypatch.setenv(name, "")  # restore the variables that `serve` sets
    with pytest.raises(UserError, match="none"):
        serve(ServeSettings(model=str(tmp_path / "none"), workers=2, port=0))
    assert codes == [3]  # with this status uvicorn starts no new worker


def test_a_worker_gets_a_number_that_no_living_worker_has(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from vlm2vec.serving.run import claim_slot;"
        f"print(claim_slot(Path({str(tmp_path)!r}), 3), flush=True); sys.stdin.read()"
    )
    assert claim_slot(tmp_path, 3) == 0
    (tmp_path / "gauge_livesum_77.db").write_bytes(b"")
    (tmp_path / "slot-1").write_text("77")  # left by a worker that died
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"1\n"
        assert claim_slot(tmp_path, 3) == 2
        other.stdin.close()
    assert not (tmp_path / "gauge_livesum_77.db").exists()
