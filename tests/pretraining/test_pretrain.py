"""The pretraining of `compact` with tiny settings: the loss falls, it resumes, and its output loads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pretraining import pretrain
from pretraining.captions import Caption
from pretraining.pretrain import Pretrainer
from pretraining.pretrain_data import Corpus
from pretraining.pretrain_recipe import PretrainRecipe
from vlm2vec import UserError
from vlm2vec.media.images import ImageRef

NAMES = ("red", "green", "blue", "white")
COLOURS = ((220, 0, 0), (0, 200, 0), (0, 0, 220), (255, 255, 255))


@pytest.fixture(autouse=True)
def corpus(monkeypatch: pytest.MonkeyPatch) -> Corpus:
    images = [ImageRef.of(Image.new("RGB", (16, 16), colour)) for colour in COLOURS]
    names = [Caption("name", image, "What is it?", name) for image, name in zip(images, NAMES, strict=True)]
    titles = [Caption("titles", None, f"a {name} thing", "") for name in NAMES]
    small = Corpus({"name": names, "scene": names, "titles": titles}, {"name": names})
    monkeypatch.setattr(pretrain, "read_corpus", lambda recipe, cache: small)
    return small


def recipe(folder: Path, **changes: Any) -> PretrainRecipe:
    settings = {
        **dict.fromkeys(("clipart", "stamps", "wordnet", "demo", "scenes"), folder),
        "output": folder / "learned.safetensors", "visual_tokens": 4, "image_size": 64, "num_layers": 1, "lora_rank": 4,
        "shares": {"name": 0.6, "titles": 0.4}, "steps": 4, "batch_size": 4, "warmup_steps": 1, "decay_steps": 2,
        "eval_every": 2, "num_held_out": 1, "learning_rate": 3e-3,
    }  # fmt: skip
    return PretrainRecipe.model_validate({**settings, **changes})


@pytest.mark.slow
def test_it_learns_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain.pretrain(Pretrainer(recipe(whole)))
    told = capsys.readouterr().out
    assert "held out: name: autoregressive" in told and "What is it? 'red' ->" in told
    save = Pretrainer.save

    def stop_after_saving(trainer: Pretrainer, step: int) -> None:
        save(trainer, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pretrainer, "save", stop_after_saving)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(Pretrainer(recipe(parts)))
    pretrain.pretrain(Pretrainer(recipe(parts)))
    one, two = (load_file(folder / "learned.safetensors") for folder in (whole, parts))
    assert one.keys() == two.keys() and {"head.weight", "projector.positions"} <= one.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_loss_falls_and_the_end_token_alone_knows_the_answer(tmp_path: Path, corpus: Corpus) -> None:
    trainer = Pretrainer(recipe(tmp_path, steps=30, shares={"name": 1.0}))
    losses = [sum(trainer.step(step)) for step in range(20)]
    assert losses[-1] < losses[0] - 3
    rows = corpus.train["name"]
    batch = trainer.rows.encode(rows)
    assert batch.labels_BL[0][batch.labels_BL[0] != -100].tolist() == [*batch.answers[0], trainer.rows.end]
    assert all(batch.ids_BL[i, end] == trainer.rows.end for i, end in enumerate(batch.ends_B))


def test_the_whitening_head_leaves_no_direction_preferred(tmp_path: Path) -> None:
    trainer = Pretrainer(recipe(tmp_path))
    head = trainer.whitening_head()
    assert all(torch.isfinite(value).all() for value in head.values())
    rows = trainer.rows.corpus.train["name"] + trainer.rows.corpus.train["titles"]
    states = []
    for part in (rows[:4], rows[4:]):
        batch = trainer.rows.encode(part)
        trainer.model.eval()
        states.append(trainer.states(part, batch)[torch.arange(4), batch.ends_B])
    white = (torch.cat(states) @ head["head.weight"].T + head["head.bias"]).detach().numpy()
    assert np.abs(white.mean(axis=0)).max() < 0.5


def test_a_kind_without_rows_is_one_line(tmp_path: Path) -> None:
    trainer = Pretrainer(recipe(tmp_path, shares={"name": 0.5, "sound": 0.5}))
    with pytest.raises(UserError, match=r"no rows of kind \['sound'\]"):
        trainer.step(0)
