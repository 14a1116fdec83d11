"""Files of an evaluation, and comparison of runs."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from evaluation.toys import ColourEncoder, RandomEncoder, write_toy_benchmark
from rich.console import Console

from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import Benchmark, load_benchmark
from vlm2vec.evaluation.comparison import Comparison, comparison_table
from vlm2vec.evaluation.evaluate import evaluate, read_results, read_tasks, results_json
from vlm2vec.evaluation.report import write_evaluation
from vlm2vec.types import EvalQuery

ABOUT = {"machine": "2 cores", "versions": {"torch": "2.13", "pillow": "12.0"}, "git_revision": None}
Toy = tuple[Benchmark, dict[str, list[EvalQuery]]]


def run(scores: dict[str, float], num_candidates: int = 4) -> dict[str, Any]:
    """A `results.json` with one vqa/ind task `A`, and grounding/ood tasks for the other names."""
    kinds = {name: ("vqa", "ind") if name == "A" else ("grounding", "ood") for name in scores}
    facts = {"metric": "hit@1", "chance": 0.25, "num_queries": 200, "num_candidates": num_candidates}
    tasks = {
        name: {**facts, "score": score, "meta_task": kinds[name][0], "split": kinds[name][1]}
        for name, score in scores.items()
    }
    ood = [score for name, score in scores.items() if name != "A"]
    groups = {"vqa": scores["A"], "ind": scores["A"], "overall": sum(scores.values()) / len(scores)}
    if ood:
        groups["grounding"] = groups["ood"] = sum(ood) / len(ood)
    return {"model": "m", "benchmark": "b", "tasks": tasks, "groups": groups}


def printed(comparison: Comparison) -> str:
    stream = io.StringIO()
    Console(file=stream, width=140).print(comparison.table)
    return stream.getvalue()


def test_an_evaluation_leaves_four_whole_files_and_nothing_else(toy: Toy, tmp_path: Path) -> None:
    benchmark, tasks = toy
    results = evaluate(ColourEncoder(), benchmark, tasks)
    output = tmp_path / "deep" / "folder"
    write_evaluation(output, "toy", benchmark, results, ABOUT)
    names = {path.name for path in output.iterdir()}
    assert names == {"results.json", "results.md", "leaderboard.json", "report.html"}
    assert read_results(output) == results_json("toy", benchmark, results, ABOUT)
    assert (output / "report.html").read_text().rstrip().endswith("</html>")


def test_a_report_that_fails_leaves_the_earlier_page_and_no_half_file(tmp_path: Path) -> None:
    benchmark, folder = load_benchmark(write_toy_benchmark(tmp_path / "data"))
    results = evaluate(ColourEncoder(), benchmark, read_tasks(benchmark, folder))
    output = tmp_path / "out"
    write_evaluation(output, "toy", benchmark, results, ABOUT)
    before = (output / "report.html").read_text()
    (folder / "Pictures" / "red.png").unlink()
    with pytest.raises(UserError, match=r"red\.png"):
        write_evaluation(output, "toy", benchmark, results, {"machine": "another"})
    assert (output / "report.html").read_text() == before
    assert len(list(output.iterdir())) == 4


def test_someone_who_reads_an_earlier_file_while_it_is_replaced_reads_it_whole(toy: Toy, tmp_path: Path) -> None:
    benchmark, tasks = toy
    results = evaluate(ColourEncoder(), benchmark, tasks)
    write_evaluation(tmp_path, "first", benchmark, results, ABOUT)
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    with contextlib.ExitStack() as stack:
        readers = {path: stack.enter_context(path.open()) for path in before}
        write_evaluation(tmp_path, "second", benchmark, results, ABOUT)
        assert {path: reader.read() for path, reader in readers.items()} == before
    assert all(path.read_text() != text for path, text in before.items())


def test_the_markdown_table_has_sizes_chance_and_score_in_percent(toy: Toy, tmp_path: Path) -> None:
    benchmark, tasks = toy
    write_evaluation(tmp_path, "toy", benchmark, evaluate(ColourEncoder(), benchmark, tasks), ABOUT)
    text = (tmp_path / "results.md").read_text()
    assert "| Find | retrieval | ind | 60 | 10 | 10.0 | 100.0 |" in text
    assert "| overall | mean of 2 | 10.0 | 100.0 |" in text
    assert "- versions: torch 2.13, pillow 12.0" in text
    assert "git" not in text


def test_the_leaderboard_file_has_the_upstream_shape(toy: Toy, tmp_path: Path) -> None:
    benchmark, tasks = toy
    about = {**ABOUT, "embedding_dimension": 10}
    write_evaluation(tmp_path, "toy", benchmark, evaluate(ColourEncoder(), benchmark, tasks), about)
    content = json.loads((tmp_path / "leaderboard.json").read_text())
    assert list(content) == ["metadata", "metrics"]
    find = content["metrics"]["image"]["Find"]
    assert (find["hit@1"], find["ndcg_linear@5"], find["num_pred"], find["num_data"]) == (1.0, 1.0, 60, 60)
    assert len(find) == 8 * 3 + 2  # every metric at every cut, as the upstream files have it
    metadata = content["metadata"]
    assert (metadata["model_name"], metadata["embedding_dimension"], metadata["url"]) == ("toy", 10, None)
    assert metadata["report_generated_date"]


def test_rows_are_the_tasks_and_then_the_groups_with_their_chance() -> None:
    rows = comparison_table({"old": run({"A": 0.5, "B": 0.1}), "new": run({"A": 0.7, "B": 0.2})}).rows
    assert [row.name for row in rows] == ["A", "B", "vqa", "grounding", "ind", "ood", "overall"]
    assert rows[-1].scores == pytest.approx((0.3, 0.45))
    assert {row.chance for row in rows} == {0.25}


def test_the_best_of_each_row_is_bold_and_equals_are_all_bold() -> None:
    comparison = comparison_table({"old": run({"A": 0.5, "B": 0.3}), "new": run({"A": 0.7, "B": 0.3})})
    assert "| A | vqa | ind | 25.0 | 50.0 | **70.0** |" in comparison.markdown
    assert "| B | grounding | ood | 25.0 | **30.0** | **30.0** |" in comparison.markdown


def test_a_single_run_has_nothing_bold_and_no_notes() -> None:
    comparison = comparison_table({"only": run({"A": 0.5})})
    assert "**" not in comparison.markdown
    assert comparison.notes == ()


def test_it_says_plainly_where_another_run_is_ahead_of_the_last() -> None:
    columns = {"dual": run({"A": 0.402, "B": 0.1, "C": 0.3}), "ours": run({"A": 0.351, "B": 0.2, "C": 0.9})}
    (note,) = comparison_table(columns).notes
    assert (
        note
        == "dual is ahead of ours on: A (40.2 against 35.1); means on which it is ahead: vqa (40.2 against 35.1), "
        + ("ind (40.2 against 35.1).")
    )


def test_it_says_plainly_where_another_run_is_nowhere_ahead() -> None:
    columns = {"old": run({"A": 0.2}), "dual": run({"A": 0.5}), "ours": run({"A": 0.5})}
    assert comparison_table(columns).notes == ("old is ahead of ours on no task.", "dual is ahead of ours on no task.")


def test_a_small_lead_is_told_with_the_digits_that_show_it() -> None:
    (note,) = comparison_table({"dual": run({"A": 0.50004}), "ours": run({"A": 0.5})}).notes
    assert "A (50.004 against 50.000)" in note


def test_runs_over_other_tasks_show_a_dash_and_a_warning() -> None:
    comparison = comparison_table({"old": run({"A": 0.5}), "new": run({"A": 0.6, "B": 0.4})})
    assert "| B | grounding | ood | 25.0 | – | **40.0** |" in comparison.markdown
    assert "cannot be compared" in comparison.notes[-1]


def test_runs_with_other_numbers_of_candidates_give_a_warning() -> None:
    comparison = comparison_table({"old": run({"A": 0.5}), "new": run({"A": 0.6}, num_candidates=1000)})
    assert "cannot be compared" in comparison.notes[-1]


def test_the_terminal_table_has_every_row_and_the_remark_every_note() -> None:
    comparison = comparison_table({"old [red]": run({"A": 0.5, "B": 0.1}), "new": run({"A": 0.7, "B": 0.2})})
    assert all(word in printed(comparison) for word in ("old [red]", "overall", "70.0"))
    assert comparison.remark == "old [red] is ahead of new on no task."


def test_a_name_with_a_bar_does_not_break_the_markdown_table() -> None:
    assert "a\\|b" in comparison_table({"a|b": run({"A": 0.5})}).markdown


def test_an_encoder_that_guesses_is_reported_as_it_is(toy: Toy, tmp_path: Path) -> None:
    benchmark, tasks = toy
    results = evaluate(RandomEncoder(), benchmark, tasks)
    write_evaluation(tmp_path, "guess", benchmark, results, {})
    assert f"| 10.0 | {100 * results[0].score:.1f} |" in (tmp_path / "results.md").read_text()
