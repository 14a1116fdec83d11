"""The model card of saved folders, and uploading them to a server that speaks the hub's API."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml

from vlm2vec import Embedder, UserError
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.checkpoints.card import MARK, card, write_card
from vlm2vec.models.checkpoints.push import push_folder
from vlm2vec.serving.settings import ServeSettings

COMMIT = "0123456789012345678901234567890123456789"


class Hub(ThreadingHTTPServer):
    """One model repository in memory: creating, committing, listing and downloading, with a token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.commits: list[dict[str, Any]] = []
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def answer(self, content: Any, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.server.paths.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":  # the hub checks the card's metadata
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            self.server.created.append(json.loads(sent))
            return self.answer({"url": f"{self.server.url}/me/model", "id": "me/model"})
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(sent)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.answer({"files": modes})
        if "/commit/" in path:
            for line in sent.decode().splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    self.server.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
                else:
                    self.server.commits.append(row["value"])
            url = f"{self.server.url}/me/model/commit/{COMMIT}"
            pull = {"pullRequestUrl": f"{self.server.url}/me/model/discussions/1"} if "create_pr=1" in self.path else {}
            return self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url, **pull})
        return self.answer({"error": path}, 404)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        files = self.server.files
        if path.startswith("/api/models/me/model/tree"):
            folder = path.partition("/tree/")[2].partition("/")[2]
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
                if name.startswith(folder)
            ]
            found = {} if rows else {"X_Error_Code": "EntryNotFound"}
            return self.answer(rows or {"error": "Entry not found"}, 200 if rows else 404, **found)
        if path.startswith("/api/models/me/model"):
            names = [{"rfilename": name} for name in files]
            return self.answer({"id": "me/model", "sha": COMMIT, "private": True, "siblings": names, "tags": []})
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name in files:
            tag = hashlib.sha1(files[name]).hexdigest()
            return self.answer(files[name], ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
        return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def saved(tiny_vlm, tmp_path_factory) -> Path:
    embedder = Embedder.from_pretrained(tiny_vlm("llava"), dtype=torch.float32, device="cpu")
    embedder.prompts = {"query": "Find it."}
    return embedder.save_pretrained(tmp_path_factory.mktemp("card") / "saved")


def header(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_a_saved_folder_has_one_card_with_metadata_and_three_ways_to_use_it(saved, tmp_path):
    text = (saved / "README.md").read_text()
    about = header(text)
    assert (about["library_name"], about["pipeline_tag"]) == ("vlm2vec", "feature-extraction")
    assert "base_model" not in about  # a folder of this machine means nothing on the hub
    assert "32 dimensions" in text and 'query: "Find it."' in text
    for words in ("Embedder.from_pretrained(", "SentenceTransformer(", "vlm2vec serve"):
        assert words in text
    assert f'model="{ServeSettings(model="any").served_names[0]}"' in text
    assert "trust_remote_code" not in text  # sentence-transformers loads this family by itself
    adapted = Embedder.from_pretrained(saved, dtype=torch.float32, device="cpu")
    adapted.base = "owner/base"
    checkpoint.add_adapter(adapted.backbone, 2, 4, 0.0, None)
    about = header((adapted.save_pretrained(tmp_path / "adapter") / "README.md").read_text())
    assert (about["base_model"], about["base_model_relation"]) == ("owner/base", "adapter")
    assert {"peft", "lora"} <= set(about["tags"])


def test_the_card_names_licence_data_and_settings_of_training(saved, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    folder = tmp_path / "model"
    folder.mkdir()
    about = json.loads((saved / "embedder.json").read_text()) | {"base": str(base)}
    (folder / "embedder.json").write_text(json.dumps(about))
    recipe = {
        "output": "runs/photos",
        "data": {"root": "TIGER-Lab/MMEB-train", "sets": ["A-OKVQA"]},
        "train": {"steps": 20, "batch_size": 8, "learning_rate": 1e-4, "seed": 1},
        "lora": {"rank": 4, "alpha": 8},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = card(folder)
    assert header(text)["license"] == "apache-2.0" and header(text)["datasets"] == ["TIGER-Lab/MMEB-train"]
    for row in ("| Steps | 20 |", "| LoRA | rank 4, alpha 8 |", "| Sets | A-OKVQA |", "# photos"):
        assert row in text


def test_scores_of_evaluations_in_the_folder_are_a_model_index_that_the_hub_client_reads(saved, tmp_path):
    from huggingface_hub import ModelCard

    folder = tmp_path / "model"
    (folder / "eval").mkdir(parents=True)
    (folder / "embedder.json").write_text((saved / "embedder.json").read_text())
    tasks = {"MSCOCO_t2i": {"metric": "hit@1", "score": 0.625}}
    found = {"model": "m", "benchmark": "mmeb-v1", "tasks": tasks, "groups": {"overall": 0.5}, "about": {}}
    (folder / "eval/results.json").write_text(json.dumps(found))
    write_card(folder, "me/model")
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert [(each.dataset_name, each.metric_type, each.metric_value) for each in results] == [
        ("mmeb-v1 overall", "mean", 50.0),
        ("mmeb-v1 MSCOCO_t2i", "hit@1", 62.5),
    ]


def test_a_card_that_a_person_wrote_is_kept(saved, tmp_path):
    (tmp_path / "embedder.json").write_text((saved / "embedder.json").read_text())
    (tmp_path / "README.md").write_text("mine")
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert MARK in (saved / "README.md").read_text()


LOADS = """
import sys, numpy as np, torch
from vlm2vec import Embedder
from sentence_transformers import SentenceTransformer
folder = sys.argv[1]
here = Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu").encode(["a red cat"])
there = Embedder.from_pretrained("me/model", dtype=torch.float32, device="cpu").encode(["a red cat"])
np.testing.assert_allclose(there, here, atol=1e-6)
model = SentenceTransformer("me/model", device="cpu", model_kwargs={"dtype": torch.float32})
np.testing.assert_allclose(model.encode(["a red cat"]), here, atol=1e-5)
"""


@pytest.mark.slow
def test_a_pushed_model_loads_by_its_id_here_and_in_sentence_transformers(saved, hub, tmp_path):
    pytest.importorskip("sentence_transformers")
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    push = [sys.executable, "-m", "vlm2vec", "push", str(saved), "me/model"]
    done = subprocess.run(push, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/model/commit/{COMMIT}" in done.stdout
    assert len(hub.commits) == 1 and hub.created[0]["name"] == "model"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    expected = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert set(hub.files) == expected
    assert b'Embedder.from_pretrained("me/model")' in hub.files["README.md"]
    loaded = subprocess.run(
        [sys.executable, "-c", LOADS, str(saved)], env=env, capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr
    asked = subprocess.run([*push, "--pull-request"], env=env, capture_output=True, text=True, check=False)
    assert f"{hub.url}/me/model/discussions/1" in asked.stdout, asked.stderr
    refused = subprocess.run(push, env={**env, "HF_TOKEN": "hf_wrong"}, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "me/model: not uploaded" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_a_folder_that_is_no_saved_model_is_not_uploaded(tmp_path):
    with pytest.raises(UserError, match=r"no embedder\.json"):
        push_folder(tmp_path, "me/model")
