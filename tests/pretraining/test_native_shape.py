"""The benchmark of another architecture with tiny settings: it trains on the same rows, and its folder loads."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pretraining import pretrain
from pretraining.captions import Caption
from pretraining.pretrain_data import Corpus
from vlm2vec import Embedder
from vlm2vec.media.images import ImageRef
from vlm2vec.training.run import train

REPO = Path(__file__).parents[2]


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPO / "benchmarks/quality")
    import native_shape

    return native_shape


@pytest.fixture
def trainer(native: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    images = [ImageRef.of(Image.new("RGB", (40, 20), colour)) for colour in ("red", "lime", "blue", "white")]
    names = [Caption("name", image, "What is it?", name) for image, name in zip(images, "abcd", strict=True)]
    titles = [Caption("titles", None, f"a thing called {name}", "") for name in "abcd"]
    small = Corpus({"name": names, "scene": names, "titles": titles}, {"name": names})
    monkeypatch.setattr(pretrain, "read_corpus", lambda recipe, cache: small)
    monkeypatch.setattr(pretrain, "best_dtype", lambda device: torch.float32)  # vectors are compared tightly
    changes = ["image_size=64", "visual_tokens=4", "width=64", "vision_layers=1", "num_layers=1", "steps=2"]
    changes += ["batch_size=4", "warmup_steps=1", "shares={name: 0.6, titles: 0.4}"]
    recipe = native.read_recipe(REPO / "pretraining/compact.yaml", tmp_path, 1e6, changes)
    return native.NativePretrainer(recipe)


@pytest.mark.slow
def test_its_folder_gives_the_states_that_were_pretrained_and_can_be_tuned(
    native: ModuleType, trainer: Any, tmp_path: Path, train_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain.pretrain(trainer)
    embedder = Embedder.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for kind, start in (("name", "<|image_1|>\n{}\n"), ("titles", "{}")):
        rows = trainer.rows.corpus.train[kind]
        batch = trainer.rows.encode(rows, answered=False)
        trainer.model.eval()
        with torch.inference_mode():
            ends = trainer.states(rows, batch)[torch.arange(len(rows)), batch.ends_B]
        seen = [{"image": row.image} if row.image else {} for row in rows]
        inputs = [{"text": start.format(row.prompt), **image} for row, image in zip(rows, seen, strict=True)]
        vectors = embedder.encode(inputs)
        assert np.allclose(vectors, torch.nn.functional.normalize(ends, dim=-1), atol=1e-5)
        assert np.ptp(vectors, axis=0).max() > 1e-4
    changes = ["data.sets=null", "train.bf16=false"]
    bench = native.tuning("demo.yaml", tmp_path / "model", train_root.parent, tmp_path / "tuned", changes)
    few_steps = ["train.steps=2", "train.warmup_steps=1", "train.save_steps=2"]
    run = train(bench.settings(few_steps, train_root, tmp_path / "run"))
    moved = Embedder.from_pretrained(run, dtype=torch.float32).backbone.model.state_dict()
    start = embedder.backbone.model.state_dict()
    assert all(not torch.equal(moved[part], start[part]) for part in start if part.endswith("q_proj.weight"))
    monkeypatch.setattr(native, "SPEED_STEPS", few_steps)
    rates = native.speed(str(tmp_path / "model"), bench).split(" | ")[2:]
    assert len(rates) == 3 and all(float(rate.strip("| ")) > 0 for rate in rates)


def test_the_rate_falls_over_the_last_quarter_of_the_time_and_the_time_ends_the_run(trainer: Any) -> None:
    rates = []
    for part in (0.0, 0.75, 0.875, 1.0):
        trainer.spent = part * trainer.recipe.seconds
        rates.append(trainer.learning_rate(1) / trainer.recipe.learning_rate)
    assert rates == pytest.approx([1, 1, 0.5, 0])
    assert trainer.finished(1)
    trainer.spent = 0.0
    assert not trainer.finished(1)
    trainer.step(0)
    assert trainer.spent > 0


def test_words_keep_what_their_first_components_hold(native: ModuleType) -> None:
    torch.manual_seed(0)
    wide = torch.randn(50, 3) @ torch.randn(3, 16) + 5
    narrow = torch.zeros(52, 3)
    native.start_words(narrow, wide)
    centred = wide - wide.mean(dim=0)
    kept = narrow[:50] @ narrow[:50].T * centred.norm(dim=-1).mean() ** 2
    assert torch.allclose(kept, centred @ centred.T, rtol=1e-3, atol=1e-2)
    assert narrow[50:].norm(dim=-1).max() < 0.2
