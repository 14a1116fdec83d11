"""The bridges between this project and MTEB in both directions, on local tasks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluation.toys import ColourEncoder, RandomEncoder
from PIL import Image
from tiny.fixtures import tiny_vlm  # noqa: F401

from vlm2vec import Embedder
from vlm2vec.evaluation.benchmark import load_benchmark
from vlm2vec.evaluation.evaluate import evaluate
from vlm2vec.evaluation.tasks import TaskReader
from vlm2vec.retrieval.embedding_cache import InputKeys
from vlm2vec.types import EmbeddingInput

mteb = pytest.importorskip("mteb")

from vlm2vec.evaluation.mteb_bridge import MtebEncoder, mteb_tasks  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class ByContent(RandomEncoder):
    """Guesses by content: one direction for equal inputs, so that two evaluators can be compared."""

    def encode(self, inputs):
        import numpy as np

        bare = [EmbeddingInput(text=(item.text or "").replace("<|image_1|>", "").strip() or None) for item in inputs]
        images = [item.images[0].load().getpixel((0, 0)) if item.images else None for item in inputs]
        seeds = [
            int.from_bytes(InputKeys()(EmbeddingInput(f"{item.text} {pixel}"))[:4], "big")
            for item, pixel in zip(bare, images, strict=True)
        ]
        return np.stack([np.random.default_rng(seed).normal(size=16) for seed in seeds]).astype(np.float32)


def run(model, tasks):
    results = mteb.evaluate(model, tasks, cache=None, show_progress_bar=False, co2_tracker=False)
    return {one.task_name: one.scores["test"][0] for one in results.task_results}


def test_an_embedder_is_an_mteb_encoder() -> None:
    from mteb.models.models_protocols import EncoderProtocol

    assert isinstance(MtebEncoder(RandomEncoder(), "runs/mine"), EncoderProtocol)
    assert MtebEncoder(RandomEncoder(), "mine").mteb_model_meta.name == "local/mine"


def test_our_tasks_run_in_mteb_with_the_scores_of_our_own_evaluator(toy_file: Path) -> None:
    benchmark, folder = load_benchmark(toy_file)
    model = MtebEncoder(ByContent(), "me/guess")
    theirs = run(model, mteb_tasks(benchmark, folder))
    unit = ByContent()
    raw = unit.encode
    unit.encode = lambda inputs: (lambda v: v / (v**2).sum(1, keepdims=True) ** 0.5)(raw(inputs))  # type: ignore[method-assign]
    ours = {r.task.name: r for r in evaluate(unit, benchmark, TaskReader(benchmark, folder))}
    for name, result in ours.items():
        found = theirs[f"colours-{name}"]
        assert found["main_score"] == pytest.approx(result.metrics["hit@1"], abs=1e-5)
        assert found["ndcg_at_5"] == pytest.approx(result.metrics["ndcg_linear@5"], abs=1e-5)
        assert found["mrr_at_10"] == pytest.approx(result.metrics["mrr@10"], abs=1e-5)


def test_a_model_that_knows_scores_one_on_text_images_and_both(toy_file: Path) -> None:
    benchmark, folder = load_benchmark(toy_file)
    scores = run(MtebEncoder(ColourEncoder(), "me/knows"), mteb_tasks(benchmark, folder))
    assert {name: found["main_score"] for name, found in scores.items()} == {"colours-Find": 1.0, "colours-Name": 1.0}


def test_mtebs_own_tasks_run_on_text_and_on_images() -> None:
    from mteb.mocks.mock_tasks.retrieval import MockAny2AnyRetrievalT2ITask, MockRetrievalTask

    scores = run(MtebEncoder(ByContent(), "me/guess"), [MockRetrievalTask(), MockAny2AnyRetrievalT2ITask()])
    assert len(scores) == 2 and all(0 <= found["main_score"] <= 1 for found in scores.values())


def test_an_embedder_runs_on_mtebs_text_image_and_mixed_tasks(tiny_vlm) -> None:  # noqa: F811
    from mteb.mocks.mock_tasks import retrieval as mocks

    embedder = Embedder.from_pretrained(tiny_vlm("qwen2_vl"), dtype=torch.float32)
    model = MtebEncoder(embedder, "me/tiny")
    assert model.mteb_model_meta.embed_dim == embedder.embedding_dim
    tasks = [mocks.MockRetrievalTask(), mocks.MockAny2AnyRetrievalI2TTask(), mocks.MockAny2AnyRetrievalT2ITask()]
    tasks += [getattr(mocks, name)() for name in dir(mocks) if name == "MockAny2AnyRetrievalIT2TTask"]
    scores = run(model, tasks)
    assert len(scores) == len(tasks) and all(0 <= found["main_score"] <= 1 for found in scores.values())
    both = model.encode(
        [{"text": ["a red square"], "image": [Image.new("RGB", (28, 28), "red")]}], task_metadata=tasks[0].metadata
    )
    assert both.shape == (1, embedder.embedding_dim)


def test_a_tasks_prompt_becomes_the_instruction_of_its_side() -> None:
    seen: list[EmbeddingInput] = []

    class Watching(ByContent):
        def encode(self, inputs):
            seen.extend(inputs)
            return super().encode(inputs)

    metadata = SimpleNamespace(prompt={"query": "Find it", "document": "Keep it"})
    model = MtebEncoder(Watching(), "me/guess")
    for side in ("query", "document"):
        vectors = model.encode([{"text": ["a", "b"]}, {"text": [""]}], task_metadata=metadata, prompt_type=side)
        assert vectors.shape == (3, 16)
    assert [item.instruction for item in seen] == ["Find it"] * 3 + ["Keep it"] * 3
    assert model.similarity(vectors, vectors).diagonal() == pytest.approx([1.0] * 3)
    assert model.similarity_pairwise(vectors, vectors) == pytest.approx([1.0] * 3)
