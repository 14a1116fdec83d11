from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny.dual import build_clip
from typer.testing import CliRunner

from vlm2vec import Embedder, EmbeddingInput, Reranker, UserError
from vlm2vec.cli import app
from vlm2vec.data.examples import TrainExample
from vlm2vec.data.mmeb import images
from vlm2vec.data.mmeb.images import list_sets
from vlm2vec.data.mmeb.train_rows import read_train_set
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.training import mining, reference
from vlm2vec.training.judging import EmbedderJudge, RerankerJudge, judge_negatives
from vlm2vec.training.mining import mine
from vlm2vec.training.nearest import MiningRule, mine_negatives

ANGLES = np.deg2rad([0, 10, 20, 40, 80])
TARGETS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM2VEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compact(tmp_path: Path) -> str:
    """A small built-in model, whose features of images are cached."""
    model = Embedder.from_pretrained("compact", num_layers=1, visual_tokens=4, image_size=64)
    return str(model.save_pretrained(tmp_path / "model"))


@pytest.fixture
def model(tiny_vlm: Callable[[str], Path]) -> str:
    return str(tiny_vlm("llava"))


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


def test_random_picks_are_allowed_targets_in_order_of_their_rank_and_the_same_in_every_run() -> None:
    rule = MiningRule(num=2, margin=None, pick="random")
    queries = np.repeat(TARGETS[:1], 50, axis=0)
    found = mine_negatives(queries, TARGETS, [1] * 50, [{1}] * 50, rule)
    assert found == mine_negatives(queries, TARGETS, [1] * 50, [{1}] * 50, rule)
    assert {tuple(one) for one in found} == {(0, 2), (0, 3), (0, 4), (2, 3), (2, 4), (3, 4)}
    assert mined(MiningRule(num=2, max_rank=2, margin=None, pick="random")) == [0, 2]
    assert mined(MiningRule(num=9, margin=0.0, pick="random")) == [2, 3, 4]


def test_no_positive_of_an_equal_query_is_mined() -> None:
    assert mined(MiningRule(num=2, margin=None), positives=(1, 0, 2)) == [3, 4]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [MiningRule(3, 1, 20, 0.05), MiningRule(3, 0, None, 0.05), MiningRule(5, 2, 9, None)])
def test_blocks_of_targets_give_the_negatives_of_one_full_sort_and_bound_the_scores_held(
    rule: MiningRule, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm2vec.training.nearest.native_precision", lambda num_scores: precision)
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
    monkeypatch.setattr("vlm2vec.training.nearest.BLOCK", 16)
    monkeypatch.setattr("vlm2vec.training.nearest.TARGETS_AT_ONCE", 64)
    real = torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda self, *args, **kw: held.append(self.numel()) or real(self, *args, **kw)
    )
    assert mine_negatives(queries, targets, own, positives, rule) == expected
    assert max(held) <= 16 * 64, "scores of one block, whatever the number of targets"


class CountedRows:
    """Vectors that record how many are read at a time."""

    def __init__(self, vectors_MD: np.ndarray) -> None:
        self.vectors_MD, self.read = vectors_MD, []

    def __len__(self) -> int:
        return len(self.vectors_MD)

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = self.vectors_MD[rows]
        self.read.append(len(found))
        return found


def test_targets_are_read_once_a_block_of_queries_and_few_of_their_cosines_are_sorted_or_scored_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(0)
    queries, targets = (random.standard_normal((count, 16), np.float32) for count in (48, 8000))
    monkeypatch.setattr("vlm2vec.training.nearest.BLOCK", 16)
    monkeypatch.setattr("vlm2vec.training.nearest.TARGETS_AT_ONCE", 200)
    monkeypatch.setattr("vlm2vec.training.nearest.native_precision", lambda num_scores: torch.bfloat16)
    again, vecdot = [], torch.linalg.vecdot
    monkeypatch.setattr(torch.linalg, "vecdot", lambda *args: again.append(len(args[0])) or vecdot(*args))
    sorted_numbers, real = [], torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda self, *args, **kw: sorted_numbers.append(self.numel()) or real(self, *args, **kw)
    )
    counted, rule = CountedRows(targets), MiningRule(num=4, margin=None, max_rank=10)
    found = mine_negatives(queries, counted, [0] * 48, [{0}] * 48, rule)
    expected = np.argsort(-(queries @ targets[1:].T), axis=1)[:, :4] + 1
    assert found == expected.tolist()
    assert max(counted.read) == 200 and sum(counted.read) == 3 * len(targets)
    assert sum(sorted_numbers) < 0.15 * queries.shape[0] * len(targets)
    assert 0 < sum(again) < 0.05 * queries.shape[0] * len(targets), "few are scored again after screening in bfloat16"


def test_mined_sets_train_with_their_images_and_words(train_root: Path, tmp_path: Path, model: str) -> None:
    output = tmp_path / "mined"
    done = CliRunner().invoke(app, ["mine", model, str(train_root), "-o", str(output), "--num", "2"])
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
        mine(model, train_root, output, MiningRule())


def test_inputs_that_were_mined_over_are_not_encoded_again(
    compact: str, train_root: Path, tmp_path: Path, cache: Path
) -> None:
    mine(compact, train_root, tmp_path / "first", MiningRule())
    images, vectors = sorted(cache.glob("vision/**/*.safetensors")), sorted(cache.rglob("*.npy"))
    assert sum(len(load_file(shard)) for shard in images) == 16 and vectors  # both sets have the same images
    mine(compact, train_root, tmp_path / "second", MiningRule())
    assert sorted(cache.glob("vision/**/*.safetensors")) == images and sorted(cache.rglob("*.npy")) == vectors
    for file in (tmp_path / "first").rglob("*.parquet"):
        assert file.read_bytes() == (tmp_path / "second" / file.relative_to(tmp_path / "first")).read_bytes()


def test_sets_mined_together_have_negatives_of_each_other(train_root: Path, tmp_path: Path, model: str) -> None:
    rule = MiningRule(num=50, margin=None)
    mine(model, train_root, tmp_path / "apart", rule)
    mine(model, train_root, tmp_path / "together", rule, together=True)
    targets = {
        name: {(e.target.text, *(i.digest() for i in e.target.images)) for e in read_train_set(train_root, name)}
        for name in list_sets(train_root)
    }
    everything = set.union(*targets.values())
    for name in list_sets(train_root):
        for root, expected in (("apart", targets[name]), ("together", everything)):
            example = read_train_set(tmp_path / root, name)[0]
            own = (example.target.text, *(i.digest() for i in example.target.images))
            found = {(n.text, *(i.digest() for i in n.images)) for n in example.negatives}
            assert found | {own} == expected


class ByTable:
    """Scores a candidate by its text; counts what it was given to prepare."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.table, self.prepared = scores, 0

    def prepare(self, items: Iterable[EmbeddingInput]) -> None:
        self.prepared += len(list(items))

    def scores(self, query: EmbeddingInput, candidates: Sequence[EmbeddingInput]) -> list[float]:
        return [self.table[str(candidate.text)] for candidate in candidates]


@pytest.mark.parametrize(
    ("num", "margin", "kept", "scores"),
    [
        (3, 0.0, [3, 2], [2.0, 1.5, -1.0]),  # 1 scores above the target: a false negative
        (1, 0.0, [3], [2.0, 1.5]),
        (3, 1.0, [2], [2.0, -1.0]),
        (3, -2.0, [1, 3, 2], [2.0, 3.0, 1.5, -1.0]),
    ],
)
def test_a_judge_keeps_false_negatives_out(num: int, margin: float, kept: list[int], scores: list[float]) -> None:
    examples = [TrainExample(EmbeddingInput(text=f"q {n}"), EmbeddingInput(text=f"t {n}")) for n in range(4)]
    judge = ByTable({"t 0": 2.0, "t 1": 3.0, "t 2": -1.0, "t 3": 1.5})
    found = judge_negatives(examples, [[1, 3, 2], [], [], []], judge, num, margin)
    assert found[0] == [kept, [], [], []] and found[1] == [scores, [3.0], [-1.0], [1.5]]
    assert judge.prepared == 8


def test_judged_sets_carry_the_cosines_of_the_judge_as_scores(
    train_root: Path, tmp_path: Path, tiny_qwen2_vl: str, model: str
) -> None:
    output = tmp_path / "judged"
    rule = MiningRule(num=2, margin=None, judged=4, judge_margin=-2.0)
    mine(model, train_root, output, rule, ["Color"], EmbedderJudge(tiny_qwen2_vl))
    judge = Embedder.from_pretrained(tiny_qwen2_vl)
    examples = read_train_set(output, "Color")
    assert {len(example.negatives) for example in examples} == {2}
    for example in examples[:3]:
        vectors = judge.encode([example.query, example.target, *example.negatives])
        np.testing.assert_allclose(example.scores, vectors[1:] @ vectors[0], atol=5e-3)  # bfloat16
    assert all(len(example.scores) == 1 for example in read_train_set(output, "Color", use_negatives=False))
    mine(model, output, tmp_path / "again", MiningRule(), ["Color"])
    assert all(example.scores == () for example in read_train_set(tmp_path / "again", "Color"))


def test_a_reranker_judges_by_its_log_odds(train_root: Path, tmp_path: Path, tiny_qwen2_vl: str, model: str) -> None:
    prompt = RerankPrompt(answers=("y", "n"))  # each is one token of the tiny tokenizer
    rule = MiningRule(margin=None, judged=2, judge_margin=-1000)
    mine(model, train_root, tmp_path / "judged", rule, ["Color"], RerankerJudge(tiny_qwen2_vl, prompt))
    reranker = Reranker.from_pretrained(tiny_qwen2_vl, prompt=prompt)
    for example in read_train_set(tmp_path / "judged", "Color")[:2]:
        expected = reranker.score(example.query, [example.target, *example.negatives])
        assert len(expected) == 2
        np.testing.assert_allclose(example.scores, expected, atol=1e-4)


def test_a_judge_that_is_no_reranker_is_a_mistake_of_one_line(train_root: Path, tmp_path: Path, model: str) -> None:
    build_clip(tmp_path / "clip")
    judging = ["--judge", str(tmp_path / "clip"), "--judge-kind", "reranker"]
    done = CliRunner().invoke(app, ["mine", model, str(train_root), "-o", str(tmp_path / "judged"), *judging])
    assert isinstance(done.exception, UserError) and "dual encoders cannot rerank pairs" in str(done.exception)
    assert not (tmp_path / "judged").exists()


def test_positives_of_equal_queries_are_those_of_every_such_pair_and_the_query_itself() -> None:
    random = np.random.default_rng(0)
    query_N, own_N = random.integers(7, size=60), random.integers(9, size=60)
    itself_Q = np.array([2, -1, 0, -1, 8, -1, -1])
    positives = mining._PositivesOfEqualQueries(query_N, own_N, itself_Q)
    for number in range(60):
        equal = {int(m) for m in own_N[query_N == query_N[number]]}
        assert positives[number] == equal | ({int(itself_Q[query_N[number]])} - {-1})


def test_sets_joined_are_their_pairs_in_order_and_mined_rows_are_written_in_blocks(
    train_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {name: read_train_set(train_root, name) for name in list_sets(train_root)[:2]}
    every = [example for rows in sets.values() for example in rows]
    joined = mining._Joined(list(sets.values()))
    assert len(joined) == len(every) and list(joined) == every and [joined[i] for i in range(len(every))] == every
    monkeypatch.setattr(images, "BLOCK", 3)
    negatives = [[(i + k) % len(every) for k in range(1, 1 + i % 3)] for i in range(len(every))]
    scores = [[0.5, *(k / 4 for k in range(len(mined)))] for mined in negatives]
    images.write_negatives(
        train_root, {name: len(rows) for name, rows in sets.items()}, negatives, tmp_path / "out", scores
    )
    written = [example for name in sets for example in read_train_set(tmp_path / "out", name)]
    for i, example in enumerate(written):
        assert [one.text for one in example.negatives] == [every[j].target.text for j in negatives[i]]
        assert (example.query.text, example.scores) == (every[i].query.text, tuple(scores[i]))


def test_a_set_is_encoded_while_a_bounded_number_of_its_inputs_is_held(
    monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(reference, "HELD", 4)
    encoder, held = reference.ReferenceModel(model), []
    real = reference.fill
    monkeypatch.setattr(
        reference, "fill", lambda cache, items, *rest, **kw: held.append(len(items)) or real(cache, items, *rest, **kw)
    )
    texts = [EmbeddingInput(f"text {i % 10} of a set") for i in range(25)]
    keys = encoder.prepare(iter(texts))
    assert held == [4, 4, 2] and len(set(keys)) == 10 and keys[:5] == keys[10:15] == keys[20:]
    np.testing.assert_allclose(encoder.rows(keys)[:], encoder.embedder.encode(texts), atol=1e-5)
