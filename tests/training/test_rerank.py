"""Training of rerankers: candidates, gradients, saved folders, resuming, several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm2vec import Embedder, EmbeddingInput, UserError
from vlm2vec.data.candidates import collate_candidates
from vlm2vec.data.examples import TrainExample
from vlm2vec.losses.ranking import RANKING_LOSSES
from vlm2vec.models.reranking.pair_model import PairModel
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.models.reranking.reranker import Reranker
from vlm2vec.training.building import build_embedder, build_reranker
from vlm2vec.training.config import Recipe, dump_recipe, load_recipe
from vlm2vec.training.rerank import RankingObjective, RerankStep
from vlm2vec.training.run import train

PROMPT = {"system": "", "body": "{query} {document}", "suffix": ""}
PRODUCT = {"head": "product", "prompt": {**PROMPT, "body": "{query}[SEP]{document}"}}


def text(words: str) -> EmbeddingInput:
    return EmbeddingInput(words)


def example(query: str, target: str, *negatives: str) -> TrainExample:
    return TrainExample(text(query), text(target), tuple(map(text, negatives)), "set")


def texts_of(examples: list[TrainExample], num: int) -> list[str]:
    """The pairs of the batch as "query:candidate", as a collated batch gives them to the processor."""
    seen: list[EmbeddingInput] = []
    collate_candidates(
        lambda items: seen.extend(items),  # type: ignore[arg-type, return-value]
        lambda query, candidate: text(f"{query.text}:{candidate.text}"),
        examples,
        num,
    )
    return [str(item.text) for item in seen]


@pytest.fixture
def values(recipe_values: dict[str, Any]) -> dict[str, Any]:
    """A recipe for a reranker of the built-in model at its smallest."""
    train = {**recipe_values["train"], "learning_rate": 3e-3}
    rerank = {"candidates": 4, "prompt": PROMPT}
    return {**recipe_values, "task": "rerank", "rerank": rerank, "train": train}


def changed(values: dict[str, Any], **changes: Any) -> Recipe:
    merged = json.loads(json.dumps(values))
    for section, change in changes.items():
        merged[section] = {**merged.get(section, {}), **change} if isinstance(change, dict) else change
    return Recipe.model_validate(merged)


def test_candidates_are_positives_then_own_negatives_then_targets_of_the_batch() -> None:
    examples = [example("a", "1", "x", "y"), example("b", "2"), example("c", "3")]
    pairs = texts_of(examples, 4)
    assert pairs[:4] == ["a:1", "a:x", "a:y", "a:2"]
    assert pairs[4:] == ["b:2", "b:3", "b:1", "c:3", "c:1", "c:2"]


def test_no_positive_of_an_equal_query_is_a_negative() -> None:
    examples = [example("a", "1"), example("a", "2"), example("b", "1"), example("c", "3", "3", "4")]
    pairs = texts_of(examples, 9)
    assert pairs[:4] == ["a:1", "a:3", "a:2", "a:3"]
    assert pairs[4:] == ["b:1", "b:3", "b:2", "c:3", "c:4", "c:1", "c:2"]


def test_a_query_without_a_negative_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(UserError, match="set: the query has no negative in its batch; add negatives"):
        texts_of([example("a", "1"), example("a", "1")], 4)


@pytest.mark.parametrize("loss", ["pointwise", "listwise"])
def test_a_step_in_chunks_has_the_gradient_of_the_plain_loss(values: dict[str, Any], loss: str) -> None:
    recipe = changed(values, lora={"dropout": 0.0}, rerank={"loss": loss})
    model = build_reranker(recipe)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    examples = [example("a red square", "red", "blue", "green"), example("dogs", "a dog", "a cat")]
    batch = collate_candidates(model.backbone.process, model.pair, examples, 4)
    step = RerankStep(model, RankingObjective(loss), recipe.train, torch.device("cpu"))
    result = step.backward(batch, model.parameters())
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    model.zero_grad()
    plain = RANKING_LOSSES[loss](model(batch.inputs)[:, 0], batch.is_positive, batch.counts).mean()
    plain.backward()
    assert float(result.loss) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert {"head.weight", "head.bias"} <= found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, parameters[name].grad, rtol=1e-4, atol=1e-6)


def test_a_product_head_starts_at_the_cosine_of_the_sides_pooled_as_by_the_embedder(values: dict[str, Any]) -> None:
    embedder = build_embedder(changed(values)).eval()
    batch = embedder.backbone.process([text("a red square[SEP]blue")])
    with torch.inference_mode():
        states_LD = embedder.backbone.hidden_states(batch)[0]
    query_D, candidate_D = states_LD[:5].mean(dim=0), states_LD[5:].mean(dim=0)  # [CLS] a red square [SEP] blue [SEP]
    model = PairModel.of(embedder, RerankPrompt(**PRODUCT["prompt"]), "product")
    score = Reranker(model).score("a red square", ["blue"])
    assert len(states_LD) == 7
    expected = torch.nn.functional.cosine_similarity(query_D, candidate_D, dim=0)
    assert score[0] == pytest.approx(20 * float(expected), abs=1e-4)
    with pytest.raises(UserError, match="expected the prompt's last token after the query as well"):
        Reranker(PairModel.of(embedder, RerankPrompt(**PROMPT), "product")).score("a red square", ["blue"])


@pytest.mark.parametrize(
    ("rerank", "lora"),
    [
        ({"loss": "listwise"}, {}),
        (PRODUCT, {}),
        pytest.param({"loss": "pointwise"}, None, marks=pytest.mark.slow),
    ],
)
def test_a_trained_reranker_lowers_its_loss_and_loads_with_equal_scores(
    values: dict[str, Any], rerank: dict[str, Any], lora: dict[str, Any] | None
) -> None:
    recipe = changed(values, rerank=rerank, lora=lora, data={"sets": ["Color"]}, train={"steps": 16})
    folder = train(recipe)
    log = json.loads((folder / "log.json").read_text())
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    reranker = Reranker.from_pretrained(str(folder), dtype=torch.float32)
    assert reranker.prompt.body == rerank.get("prompt", PROMPT)["body"]
    assert reranker.scorer.head.kind == rerank.get("head", "linear")
    candidates = ["red", "blue", Path("missing.png")]
    scores = reranker.score("a red square", candidates, on_error=lambda index, error: None)
    assert np.isnan(scores[2])
    assert scores[0] != scores[1]
    again = reranker.scorer.save_pretrained(folder.with_name("again"))
    same = Reranker.from_pretrained(str(again), dtype=torch.float32)
    np.testing.assert_array_equal(same.score("a red square", candidates[:2]), scores[:2])
    with pytest.raises(UserError, match=r"is a reranker and gives no embeddings; use Reranker\.from_pretrained"):
        Embedder.from_pretrained(folder)


def test_a_resumed_run_equals_the_uninterrupted_one(values: dict[str, Any]) -> None:
    whole = train(changed(values))
    resumed = whole.with_name("resumed")
    shutil.copytree(whole / "checkpoints/checkpoint-3", resumed / "checkpoints/checkpoint-3")
    train(changed(values, output=str(resumed)), resume=True)
    for name in ("head.safetensors", "adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(values: dict[str, Any], tmp_path: Path, tiny_qwen2_vl: str) -> None:
    # Own negatives are enough for all candidates: targets of the batch come from the rank's own part. Without dropout,
    # of which the built-in model has some of its own.
    same = {"model": {"base": tiny_qwen2_vl, "options": {}}, "lora": {"dropout": 0.0}, "train": {"steps": 2}}
    rerank = {"candidates": 2, "prompt": {**PROMPT, "answers": ["y", "n"]}}
    same |= {"data": {"sub_batch_size": 4}, "rerank": rerank}
    alone, pair = (changed(values, **same, output=str(tmp_path / name)) for name in ("alone", "pair"))
    root = with_own_negatives(Path(values["data"]["root"]), tmp_path / "data")
    alone, pair = (changed(json.loads(r.model_dump_json()), data={"root": str(root)}) for r in (alone, pair))
    train(alone)
    (tmp_path / "pair.yaml").write_text(dump_recipe(pair))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "vlm2vec.cli", "train", str(tmp_path / "pair.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    logs = [json.loads((recipe.output / "log.json").read_text()) for recipe in (alone, pair)]
    for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        np.testing.assert_allclose([e[key] for e in logs[1]], [e[key] for e in logs[0]], rtol=tolerance)


def with_own_negatives(root: Path, output: Path) -> Path:
    """The training sets, each pair with the next pair's target that differs as its negative."""
    from vlm2vec.data.mmeb.images import list_sets, write_negatives
    from vlm2vec.data.mmeb.train_rows import read_train_set

    for name in list_sets(root):
        rows = list(read_train_set(root, name))
        negatives = [[next(j for j, other in enumerate(rows) if other.target != row.target)] for row in rows]
        write_negatives(root, {name: len(rows)}, negatives, output, None)
    return output


def test_settings_without_effect_are_named(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(changed(values)))
    with pytest.raises(UserError, match=r"task rerank does not support loss, train\.ema_decay; remove the setting"):
        load_recipe(file, ["loss.hardness_alpha=1", "train.ema_decay=0.5"])
    with pytest.raises(UserError, match=r"rerank has no effect on task embed; set task: rerank"):
        load_recipe(file, ["task=embed"])
