"""The second stage of an evaluation: scores in closed form, both reported, resumed, and one bad pair alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation.toys import COLOURS, ColourEncoder, ConstantEncoder, RandomEncoder
from tiny.fixtures import *  # noqa: F403 - fixtures
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import Benchmark, EvalTask
from vlm2vec.evaluation.evaluate import evaluate, results_json
from vlm2vec.evaluation.report import write_evaluation
from vlm2vec.evaluation.reranked import columns_of
from vlm2vec.evaluation.second_stage import FirstStage, SecondStage, reordered
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.models.reranking.reranker import Reranker
from vlm2vec.retrieval.embedding_cache import EmbeddingCache, MemoryCache
from vlm2vec.types import EmbeddingInput, EvalQuery

Toy = tuple[Benchmark, dict[str, list[EvalQuery]]]
ABOUT = {"model": "toy reranker"}


class ColourRanker:
    """Scores 1 for the same colour and 0 otherwise; cannot read pairs whose candidate has a colour of `bad`."""

    def __init__(self, sign: float = 1.0, bad: Sequence[str] = ()) -> None:
        self.sign, self.bad = sign, {list(COLOURS).index(name) for name in bad}
        self.num_scored = 0

    def score(
        self,
        query: EmbeddingInput,
        candidates: Sequence[EmbeddingInput],
        *,
        on_error: Callable[[int, UserError], None],
    ) -> np.ndarray:
        self.num_scored += len(candidates)
        asked, *found = ColourEncoder().encode([query, *candidates]).argmax(axis=1)
        for index, colour in enumerate(found):
            if colour in self.bad:
                on_error(index, UserError("cannot be read"))
        return np.array([np.nan if c in self.bad else self.sign * (c == asked) for c in found], np.float32)


def stage(ranker: Any, top: int = 50, cache: Any = None) -> SecondStage:
    return SecondStage(ranker, MemoryCache() if cache is None else cache, top, ABOUT)


def test_a_reranker_that_knows_lifts_a_guess_to_one_and_both_scores_are_kept(toy: Toy) -> None:
    results = evaluate(RandomEncoder(), *toy, second=stage(ColourRanker()))
    alone = evaluate(RandomEncoder(), *toy)
    assert [(r.score, r.metrics) for r in results] == [(r.score, r.metrics) for r in alone]
    assert [r.reranked.score for r in results] == [1.0, 1.0]
    assert [r.reranked.metrics["mrr@10"] for r in results] == [1.0, 1.0]


def test_only_the_first_candidates_are_reranked_so_the_gain_is_bounded_by_recall(toy: Toy) -> None:
    results = evaluate(RandomEncoder(), *toy, second=stage(ColourRanker(), top=5))
    for result in results:
        assert 0 < result.metrics["hit@1"] < result.metrics["hit@5"] < 1
        assert result.reranked.score == result.reranked.metrics["hit@5"] == result.metrics["hit@5"]
        assert result.reranked.metrics["hit@10"] == result.metrics["hit@10"]
    upside_down = evaluate(RandomEncoder(), *toy, second=stage(ColourRanker(sign=-1), top=5))
    assert [result.reranked.score for result in upside_down] == [0.0, 0.0]


def test_the_cosine_joins_the_log_odds_by_its_weight(toy: Toy) -> None:
    """A ranker that is always wrong, against an embedder that is always right: cosines 1 and 0, log-odds -1 and 0."""
    for weight, expected in ((0.0, 0.0), (0.5, 0.0), (2.0, 1.0)):
        second = SecondStage(ColourRanker(sign=-1), MemoryCache(), 5, ABOUT, weight)
        results = evaluate(ColourEncoder(), *toy, second=second)
        assert [result.reranked.score for result in results] == [expected] * 2
        assert results[0].reranked.model == ("toy reranker" if weight == 0 else f"toy reranker + {weight:g} cosine")


def test_ties_are_lost_by_the_gold_at_both_stages(toy: Toy) -> None:
    constant = stage(ColourRanker(sign=0))
    assert [r.reranked.score for r in evaluate(ColourEncoder(), *toy, second=constant)] == [0.0, 0.0]
    # All cosines are equal: the gold, listed first, is not among the first nine.
    almost = stage(ColourRanker(), top=9)
    assert [r.reranked.score for r in evaluate(ConstantEncoder(), *toy, second=almost)] == [0.0, 0.0]


def test_an_unreadable_pair_goes_to_the_end_and_is_counted(toy: Toy) -> None:
    results = evaluate(ColourEncoder(), *toy, second=stage(ColourRanker(bad=["red"])))
    for result in results:
        assert result.reranked.num_unreadable == result.num_queries
        assert result.reranked.score == pytest.approx(0.9)  # a tenth of the golds is red
    unreadable = stage(ColourRanker(bad=list(COLOURS)), top=3)
    for result in evaluate(RandomEncoder(), *toy, second=unreadable):
        assert result.reranked.metrics == pytest.approx(result.metrics)  # the embedder's order stays


def test_the_new_order_is_reranked_then_unreadable_then_the_rest() -> None:
    first = FirstStage([4, 0, 3, 1], np.array([0.9, 0.8, 0.7, 0.6], np.float32), {5: 0.1, 0: 0.8}, 6)
    order = reordered(first, np.array([-2.0, np.nan, 1.5], np.float32))
    assert np.argsort(-order.values_M).tolist() == [3, 4, 0, 1, 5, 2]
    assert order.places == [3, 4, 0]
    tied = reordered(first, np.array([1.0, 2.0, 1.0], np.float32)).values_M
    assert tied[4] == tied[3] < tied[0]


def test_scores_are_kept_by_pair_and_a_later_run_scores_the_missing_ones_only(toy: Toy, tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, ABOUT)
    ranker = ColourRanker(bad=["pink"])
    benchmark, tasks = toy
    whole = evaluate(RandomEncoder(), *toy, second=stage(ranker, cache=cache))
    num_pink = 60 + 10
    assert ranker.num_scored == 60 * 10 + 10 * 10
    again = ColourRanker(bad=["pink"])
    repeated = evaluate(RandomEncoder(), *toy, second=stage(again, cache=EmbeddingCache(tmp_path, ABOUT)))
    assert again.num_scored == num_pink  # an unreadable candidate may have been repaired
    for before, after in zip(whole, repeated, strict=True):
        assert before.reranked.metrics == after.reranked.metrics
        assert before.reranked.seconds_per_query > 0
    other = Benchmark(name="one", tasks=[task for task in benchmark.tasks if task.name == "Find"])
    killed = ColourRanker()
    evaluate(RandomEncoder(), other, {"Find": tasks["Find"]}, second=stage(killed, cache=EmbeddingCache(tmp_path, {})))
    rest = ColourRanker()
    evaluate(RandomEncoder(), *toy, second=stage(rest, cache=EmbeddingCache(tmp_path, {})))
    assert (killed.num_scored, rest.num_scored) == (60 * 10, 10 * 10)


def test_candidates_of_equal_content_rank_in_their_listed_order(tmp_path: Path) -> None:
    texts = ("red", "blue", "red", "green")
    queries = [EvalQuery(EmbeddingInput("find red"), tuple(map(EmbeddingInput, texts)), (0,))]
    task = EvalTask(name="Copies", meta_task="retrieval", reader="records")
    benchmark = Benchmark(name="copies", tasks=[task])
    [result] = evaluate(RandomEncoder(), benchmark, {"Copies": queries}, second=stage(ColourRanker()))
    assert result.reranked.score == 1.0


def test_the_report_has_both_scores_with_time_and_unreadable_pairs(toy: Toy, tmp_path: Path) -> None:
    benchmark, _ = toy
    second = stage(ColourRanker(bad=["red"]))
    results = evaluate(RandomEncoder(), *toy, second=second)
    write_evaluation(tmp_path, "toy", benchmark, results, {"reranker": second.about})
    content = json.loads((tmp_path / "results.json").read_text())
    find = content["tasks"]["Find"]["reranked"]
    assert (find["model"], find["top"], find["num_unreadable"]) == ("toy reranker", 50, 60)
    assert find["score"] == pytest.approx(0.9) and find["seconds_per_query"] > 0
    alone, reranked = columns_of(content).values()
    assert alone["groups"]["overall"] < reranked["groups"]["overall"] == pytest.approx(0.9)
    text = (tmp_path / "results.md").read_text()
    assert "## The first 50 candidates reranked by toy reranker" in text
    assert re.search(r"\| Find \| \d+\.\d \| 90\.0 \| [\d.]+ to [\d.]+ \| \d\.\d\d \| 60 \|", text)
    page = (tmp_path / "report.html").read_text()
    assert "toy + <wbr>toy reranker" in page or "toy + toy reranker" in page
    assert "60 pairs could not be read" in page and "log-odds 1.0000" in page


def test_the_command_reranks_with_a_real_model(
    toy_file: Path, tiny_vlm: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_vlm("qwen2_vl")
    load = Reranker.from_pretrained
    prompt = RerankPrompt(system="Judge.", answers=("y", "n"))
    monkeypatch.setattr(Reranker, "from_pretrained", lambda source, **options: load(source, prompt=prompt, **options))
    command = ["eval", str(folder), "--benchmark", str(toy_file), "--task", "Name", "--cache", str(tmp_path / "cache")]
    command += ["--rerank", str(folder), "--top", "3"]
    written = []
    for name in ("first", "second"):
        done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / name)], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        written.append((tmp_path / name / "results.json").read_text())
    assert written[0] == written[1]  # the times, too, are those of the first run
    found = json.loads(written[0])["tasks"]["Name"]["reranked"]
    assert (found["top"], found["num_unreadable"]) == (3, 0) and found["seconds_per_query"] > 0
    reported = CliRunner().invoke(app, ["report", str(tmp_path / "first"), "-o", str(tmp_path / "report")])
    assert reported.exit_code == 0, reported.output
    assert f"{folder} + {folder}" in (tmp_path / "report/report.md").read_text()


def test_a_model_that_cannot_rerank_is_refused_before_anything_is_encoded(toy_file: Path, tmp_path: Path) -> None:
    command = ["eval", "compact", "--benchmark", str(toy_file), "--rerank", str(tmp_path), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and not (tmp_path / "out").exists()


def test_results_without_a_second_stage_are_as_before(toy: Toy) -> None:
    content = results_json("toy", toy[0], evaluate(ColourEncoder(), *toy))
    assert "reranked_groups" not in content and "reranked" not in content["tasks"]["Find"]
    assert list(columns_of(content)) == ["toy"]


def test_two_processes_of_torchrun_share_the_pairs_of_each_task_and_give_the_same_results(
    toy_file: Path, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("reranked_ranks.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    results, scored = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launch, str(script), str(toy_file), str(folder / "cache"), str(folder / "out")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        content = json.loads((folder / "out/results.json").read_text())
        for task in content["tasks"].values():
            assert task["reranked"].pop("seconds_per_query") > 0
        results.append(content)
        scored.append([int(count) for count in re.findall(r"scored (\d+)", done.stdout)])
    assert results[0] == results[1] and 0 < results[0]["reranked_groups"]["overall"] < 1
    assert scored == [[350], [175, 175]]  # five candidates of each of 60 and 10 queries
