"""The model card of saved folders, and uploading them to a server that speaks the hub's API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import COMMIT, running_hub

from vlm2vec import Embedder, UserError
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.checkpoints.card import MARK, card, write_card
from vlm2vec.models.checkpoints.push import push_folder
from vlm2vec.models.reranking.loading import load_pair_model
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.serving.settings import ServeSettings


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


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


def test_a_reranker_has_its_own_card_with_scores_after_reranking_and_is_uploaded(tiny_vlm, hub, tmp_path):
    prompt = RerankPrompt(answers=("y", "n"))
    folder = tmp_path / "ranker"
    load_pair_model(tiny_vlm("qwen2_vl"), prompt, device="cpu").save_pretrained(folder)
    text = (folder / "README.md").read_text()
    about = header(text)
    assert (about["library_name"], about["pipeline_tag"]) == ("vlm2vec", "text-ranking")
    assert "cross-encoder" in about["tags"] and 'the logit of "y" less that of "n"' in text
    for words in ("Reranker.from_pretrained(", "CrossEncoder(", "trust_remote_code=True", "--reranker"):
        assert words in text
    recipe = {"output": "runs/ranker", "task": "rerank", "rerank": {"loss": "listwise", "candidates": 6}}
    recipe |= {"data": {"root": "data/mined"}, "train": {"steps": 20, "temperature": 0.02}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "eval").mkdir()
    tasks = {"Find": {"metric": "hit@1", "score": 0.25, "reranked": {"score": 0.5}}}
    found = {"benchmark": "toy", "tasks": tasks, "groups": {"overall": 0.25}, "reranked_groups": {"overall": 0.5}}
    (folder / "eval/results.json").write_text(json.dumps(found))
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert [row["metrics"][0]["value"] for row in header(text)["model-index"][0]["results"]] == [50.0, 50.0]
    assert "| Loss | listwise |" in text and "| Candidates of a query | 6 |" in text and "Temperature" not in text
    env = {**os.environ, **hub.environment(tmp_path)}
    push = [sys.executable, "-m", "vlm2vec", "push", str(folder), "me/ranker"]
    done = subprocess.run(push, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b'Reranker.from_pretrained("me/ranker")' in hub.repositories["me/ranker"]["README.md"]


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
    env = {**os.environ, **hub.environment(tmp_path)}
    push = [sys.executable, "-m", "vlm2vec", "push", str(saved), "me/model"]
    done = subprocess.run(push, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/model/commit/{COMMIT}" in done.stdout
    assert len(hub.commits) == 1 and hub.created[0]["name"] == "model"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    expected = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    files = hub.repositories["me/model"]
    assert set(files) == expected
    assert b'Embedder.from_pretrained("me/model")' in files["README.md"]
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
