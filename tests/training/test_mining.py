from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vlm2vec import Embedder, UserError
from vlm2vec.cli import app
from vlm2vec.data.mmeb.images import list_sets, read_train_set
from vlm2vec.training.mining import MiningRule, mine, mine_negatives

ANGLES = np.deg2rad([0, 10, 20, 40, 80])
TARGETS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)


def mined(rule: MiningRule, own: int = 1, positives: tuple[int, ...] = (1,)) -> list[int]:
    """For one query at angle 0 whose positive is at 10 degrees."""
    return mine_negatives(TARGETS[:1], TARGETS, [own], [set(positives)], rule)[0]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (MiningRule(num=2, margin=None), [0, 2]),  # the nearest first, the positive left out
        (MiningRule(num=2, margin=0.0), [2, 3]),  # nothing nearer than the positive
        (MiningRule(num=2, margin=0.1), [3, 4]),  # cos 10 - cos 20 = 0.05, cos 10 - cos 40 = 0.22
        (MiningRule(num=1, skip=1, margin=None), [2]),
        (MiningRule(num=3, max_rank=2, margin=None), [0, 2]),
        (MiningRule(num=2, max_rank=None, margin=0.1), [3, 4]),
    ],
)
def test_ranks_and_margin_choose_the_negatives(rule: MiningRule, expected: list[int]) -> None:
    assert mined(rule) == expected


def test_no_positive_of_an_equal_query_is_mined() -> None:
    assert mined(MiningRule(num=2, margin=None), positives=(1, 0, 2)) == [3, 4]


@pytest.mark.parametrize("rule", [MiningRule(3, 1, 20, 0.05), MiningRule(3, 0, None, 0.05), MiningRule(5, 2, 9, None)])
def test_blocks_of_targets_give_the_negatives_of_one_full_sort_and_bound_the_scores_held(
    rule: MiningRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    queries, targets = (random.standard_normal((count, 16), np.float32) for count in (50, 400))
    queries, targets = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (queries, targets))
    own = random.integers(400, size=50).tolist()
    positives = [{own[n], *random.integers(400, size=3).tolist()} for n in range(50)]
    expected = []
    for n, scores in enumerate(queries.astype(np.float64) @ targets.T.astype(np.float64)):
        limit = np.inf if rule.margin is None else scores[own[n]] - rule.margin
        order = [m for m in np.argsort(-scores) if m not in positives[n]]
        if rule.max_rank is None:
            order = [m for m in order if scores[m] <= limit]
        ranked = order[rule.skip : rule.max_rank]
        expected.append([int(m) for m in ranked if scores[m] <= limit][: rule.num])
    held: list[int] = []
    monkeypatch.setattr("vlm2vec.training.mining.BLOCK", 16)
    monkeypatch.setattr("vlm2vec.training.mining.TARGETS_AT_ONCE", 64)
    real = torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda self, *args, **kw: held.append(self.numel()) or real(self, *args, **kw)
    )
    assert mine_negatives(queries, targets, own, positives, rule) == expected
    assert max(held) <= 16 * 64, "scores of one block, whatever the number of targets"


def test_mined_sets_train_with_their_images_and_words(train_root: Path, tmp_path: Path) -> None:
    output = tmp_path / "mined"
    settings = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}
    folder = Embedder.from_pretrained("compact", **settings).save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(app, ["mine", str(folder), str(train_root), "-o", str(output), "--num", "2"])
    assert done.exit_code == 0, done.output
    assert list_sets(output) == list_sets(train_root)
    for name in list_sets(output):
        before, after = (read_train_set(root, name, use_negatives=root == output) for root in (train_root, output))
        assert [(e.query.text, e.target.text) for e in before] == [(e.query.text, e.target.text) for e in after]
        targets = {(e.target.text, tuple(i.digest() for i in e.target.images)) for e in before}
        negatives = [n for e in after for n in e.negatives]
        assert negatives and max(len(e.negatives) for e in after) <= 2
        for example in after:
            for negative in example.negatives:
                assert (negative.text, tuple(i.digest() for i in negative.images)) in targets
                assert negative != example.target
    with pytest.raises(UserError, match="already exists"):
        mine(str(folder), train_root, output, MiningRule())


def test_images_that_were_mined_over_are_not_encoded_again(
    train_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm2vec.training.mining.cache_folder", lambda: tmp_path / "cache")
    model = Embedder.from_pretrained("compact", num_layers=1, visual_tokens=4, image_size=64)
    folder = str(model.save_pretrained(tmp_path / "model"))
    mine(folder, train_root, tmp_path / "first", MiningRule())
    shards = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert sum(len(load_file(shard)) for shard in shards) == 16  # both sets have the same images
    mine(folder, train_root, tmp_path / "second", MiningRule())
    assert sorted((tmp_path / "cache").rglob("*.safetensors")) == shards
    for file in (tmp_path / "first").rglob("*.parquet"):
        assert file.read_bytes() == (tmp_path / "second" / file.relative_to(tmp_path / "first")).read_bytes()
