"""Runs, leaderboard files and published rows side by side; the leaderboard's averages."""

from __future__ import annotations

import csv
import json
import os
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import read_benchmark
from vlm2vec.evaluation.overview import overview, published_rows, read_run, write_overview
from vlm2vec.evaluation.plots import Point, against, by_size, grouped_bars
from vlm2vec.evaluation.upstream import UPSTREAM_NAMES, leaderboard_means, read_upstream

# Beside a clone, where its makers keep reference material.
BESIDE = Path(__file__).parents[3] / "shared/data/upstream-scores"
UPSTREAM = Path(os.environ.get("VLM2VEC_UPSTREAM_SCORES", BESIDE))
# arXiv 2507.04590, table 2, and means that others computed from the reference repository's files.
PUBLISHED = {
    "VLM2Vec-V2.0-Qwen2VL-2B.json": {"image": 64.9, "classification": 62.9, "ind": 68.8, "video_classification": 39.3},
    "gme-Qwen2-VL-2B-Instruct.json": {"image": 51.9, "vqa": 29.9, "visrag": 82.5, "overall": 54.1},
    "VLM2Vec-V1-Qwen2VL-7B.json": {"retrieval": 69.4, "classification": 62.7, "image": 65.5},
}


# Rows whose four published means do not give their published overall: both are as published.
ODD = {"SigLIP (base-224)", "VLM2Vec (Qwen2-VL-2B)"}


def upstream_file(folder: Path, leave_out: str = "", renamed: bool = True) -> Path:
    """A leaderboard file with every task of MMEB-V2: hit@1 0.5, or 0.25 in ndcg_linear@5."""
    metrics: dict[str, dict[str, Any]] = {"image": {}, "video": {"MomentSeeker_1k8": {"hit@1": 0.9, "num_data": 1}}}
    metrics["visdoc"] = {}
    for name, task in UPSTREAM_NAMES.items():
        scores = {"hit@1": 0.5, "ndcg_linear@5": 0.25, "num_pred": 10, "num_data": 10}
        shown = f"{name}-fixed" if renamed and name in ("ViDoSeek-page", "MMLongBench-page") else name
        metrics[task.modality][shown] = "FILE_N/A" if name == leave_out else scores
    path = folder / "up.json"
    path.write_text(json.dumps({"metadata": {"model_name": "Up", "model_size": "2B"}, "metrics": metrics}))
    return path


def test_a_leaderboard_file_is_read_with_its_documents_metric_and_its_mended_names(tmp_path: Path) -> None:
    content = read_upstream(upstream_file(tmp_path))
    assert len(content["tasks"]) == 78 and content["missing"] == []
    groups = content["groups"]
    assert (groups["image"], groups["video"], groups["visdoc"]) == (0.5, 0.5, 0.25)
    assert groups["overall"] == pytest.approx((54 * 0.5 + 24 * 0.25) / 78)
    assert content["about"]["other_tasks"] == "MomentSeeker_1k8"
    assert leaderboard_means(content)["overall"] == pytest.approx(groups["overall"])


def test_a_missing_task_is_named_left_out_of_the_means_and_counted_as_zero_beside(tmp_path: Path) -> None:
    content = read_run(upstream_file(tmp_path, leave_out="CIRR"))
    assert content["missing"] == ["CIRR"]
    assert content["groups"]["retrieval"] == 0.5
    assert leaderboard_means(content)["retrieval"] == pytest.approx(0.5 * 11 / 12)
    seen = overview([content])
    assert seen.runs[0].missing == ("CIRR",)
    (note,) = seen.notes
    assert note.startswith("Up has no score on 1 tasks (CIRR): its means are of the others.")
    assert "its overall is 41.7" in note


@pytest.mark.skipif(not UPSTREAM.is_dir(), reason="the published score files are not beside this clone")
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_means_come_out_of_the_published_files(name: str) -> None:
    content = read_run(UPSTREAM / name)
    assert content["missing"] == []
    found = {group: 100 * content["groups"][group] for group in PUBLISHED[name]}
    assert found == pytest.approx(PUBLISHED[name], abs=0.15)
    # Means by another way: straight from the file.
    raw = json.loads((UPSTREAM / name).read_text())["metrics"]
    names = {task.name: task.modality for task in read_benchmark("mmeb-v2")[0].tasks}
    for modality, metric in (("image", "hit@1"), ("video", "hit@1"), ("visdoc", "ndcg_linear@5")):
        scores = [raw[modality][task][metric] for task, kind in names.items() if kind == modality]
        assert content["groups"][modality] == pytest.approx(sum(scores) / len(scores))


def test_a_report_has_all_four_files_with_published_rows_and_tasks(tmp_path: Path) -> None:
    run = read_run(upstream_file(tmp_path))
    own = {**run, "model": "runs/mine & <co>", "benchmark": "mmeb-v2", "about": {"template": "abc", "frames": 8}}
    output = tmp_path / "report"
    write_overview(output, [run, own])
    text = (output / "report.md").read_text()
    assert "| VLM2Vec-V2 (Qwen2-VL-2B) | P2 |" in text and "| Up | file |" in text
    assert "| OK-VQA | vqa | 50.0 | 50.0 |" in text
    assert "- template: abc" in text and "- frames: 8" in text
    rows = list(csv.DictReader((output / "report.csv").read_text().splitlines()))
    assert {row["kind"] for row in rows} == {"group", "task"}
    assert len([row for row in rows if row["kind"] == "task"]) == 2 * 78
    assert {row["score"] for row in rows if row["name"] == "ViDoRe_docvqa"} == {"25.0000"}
    page = (output / "report.html").read_text()
    parser = HTMLParser()
    parser.feed(page)
    assert "runs/mine &amp; &lt;co&gt;" in page and "<co>" not in page
    assert page.count("<svg") == 3 and "http" not in page
    board = json.loads((output / "leaderboard-runs-mine----co.json").read_text())
    assert set(board["metrics"]) == {"image", "video", "visdoc"}
    assert read_upstream(output / "leaderboard-Up.json")["groups"] == run["groups"]


def test_published_rows_have_sources_and_their_means_fit_their_parts() -> None:
    first, second = published_rows("mmeb-v1"), published_rows("mmeb-v2")
    assert len(first) == 24 and len(second) == 21
    for row in first:
        parts = [row.scores[group] for group in ("classification", "vqa", "retrieval", "grounding")]
        if None not in parts and row.model not in ODD:
            mean = sum(n * part for n, part in zip((10, 10, 12, 4), parts, strict=True)) / 36
            assert mean == pytest.approx(row.scores["overall"], abs=0.6), row.model
        if row.scores["ind"] is not None:
            both = (20 * row.scores["ind"] + 16 * row.scores["ood"]) / 36
            assert both == pytest.approx(row.scores["overall"], abs=0.2), row.model
    for row in second:
        parts = [row.scores[group] for group in ("image", "video", "visdoc")]
        if None not in parts:
            mean = sum(n * part for n, part in zip((36, 18, 24), parts, strict=True)) / 78
            assert mean == pytest.approx(row.scores["overall"], abs=0.3), row.model


def test_runs_of_different_benchmarks_and_files_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    run = read_run(upstream_file(tmp_path))
    with pytest.raises(UserError, match="different benchmarks"):
        overview([run, {**run, "benchmark": "mine"}])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x\.json: expected model, benchmark"):
        read_run(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"no results\.json there"):
        read_run(tmp_path)


def test_drawings_are_well_formed_and_hold_their_values() -> None:
    bars = grouped_bars("t", ["vqa", "a & b"], [("one", [50.0, None]), ("two <x>", [0.0, 100.0])])
    points = [Point("a", 30, 40, ours=True), Point("b & c", 70, 20, ours=False)]
    for drawing in (bars, against("t", "x", "y", points), by_size("t", "y", [Point("a", 2, 40, True)])):
        assert ET.fromstring(drawing).tag == "svg"
    rectangles = [e for e in ET.fromstring(bars) if e.tag == "rect"]
    heights = [float(rectangle.get("height", "0")) for rectangle in rectangles]
    assert len(heights) == 3 and heights[2] == pytest.approx(2 * heights[0], rel=0.01) and heights[1] == 0
