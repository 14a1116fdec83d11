"""Listing present and missing data, and fetching it; a folder stands in for the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from data.layouts import write_corpus_set, write_image_set, write_video_set, write_visdoc_set
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import load_benchmark, read_benchmark, read_revisions
from vlm2vec.evaluation.data_check import check_data, download_size, fetch_task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three sets, twelve queries each: one whole, one without an image, one of another size than stated."""
    write_image_set(tmp_path, "OK-VQA", "image_qa", with_instructions=False)
    write_image_set(tmp_path, "CIRR", "image_i2i_vg", with_instructions=False)
    write_image_set(tmp_path, "GQA", "image_qa", with_instructions=False)
    (tmp_path / "MMEB/CIRR/c_4.png").unlink()
    (tmp_path / "GQA/test-00000-of-00001.parquet").write_bytes(b"no parquet")
    return tmp_path


def test_each_task_is_ready_or_says_what_is_missing_and_how_to_get_it(folder: Path) -> None:
    benchmark, _ = load_benchmark("mmeb-v1", folder)
    relaxed = [task.model_copy(update={"num_queries": 12, "num_candidates": 12}) for task in benchmark.tasks]
    checks = {c.task.name: c for c in check_data(benchmark.model_copy(update={"tasks": relaxed}), folder)}
    ready = checks["OK-VQA"]
    assert (ready.status, ready.num_queries, ready.num_images, ready.num_missing) == ("ready", 12, 12, 0)
    assert ready.num_bytes == (folder / "OK-VQA/test-00000-of-00001.parquet").stat().st_size
    cirr = checks["CIRR"]
    assert (cirr.status, cirr.num_missing) == ("images missing", 1)
    assert "c_4.png" in cirr.detail and "images.zip of TIGER-Lab/MMEB-eval" in cirr.detail
    assert checks["GQA"].status == "unreadable" and "not a readable parquet" in checks["GQA"].detail
    lost = checks["WebQA"]
    assert lost.status == "rows missing"
    assert f"vlm2vec data fetch mmeb-v1 --data {folder} --task 'WebQA'" in lost.detail
    stated = {c.task.name: c for c in check_data(benchmark.only(["OK-VQA"]), folder)}["OK-VQA"]
    assert stated.status == "wrong counts" and "num_queries is 12, but the benchmark states 1000" in stated.detail


def test_videos_and_documents_are_checked_too(tmp_path: Path) -> None:
    write_video_set(tmp_path, "MSVD", num_frames=2)
    write_visdoc_set(tmp_path, "VisRAG_ChartQA")
    benchmark, _ = load_benchmark("mmeb-v2", tmp_path)
    checks = check_data(benchmark.only(["MSVD", "VisRAG_ChartQA"]), tmp_path)
    assert [(c.status, c.num_queries, c.num_images) for c in checks] == [
        ("wrong counts", 12, 24),
        ("wrong counts", 12, 15),
    ]
    (heard,) = check_data(read_benchmark("mmeb-v3")[0].only(["Clotho"]), tmp_path)
    assert (heard.status, heard.detail) == ("no reader", "its queries or targets are sounds, which no model here takes")


def test_the_command_prints_the_table_and_exits_one_if_something_is_missing(folder: Path) -> None:
    done = CliRunner().invoke(app, ["data", "check", "mmeb-v1", "--data", str(folder), "--task", "CIRR"])
    assert done.exit_code == 1
    assert "CIRR" in done.stdout and "0 of 1 tasks are ready" in done.stdout


def test_fetching_takes_the_named_files_and_records_their_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, data = tmp_path / "hub", tmp_path / "data"
    write_image_set(hub, "CIRR", "image_i2i_vg", with_instructions=False)
    data.mkdir()
    asked = []

    def download(repo_id: str, revision: str, local_dir: str, allow_patterns: list[str], repo_type: str) -> str:
        asked.append((repo_id, revision, allow_patterns, repo_type))
        for pattern in allow_patterns:
            for file in hub.glob(pattern):
                (Path(local_dir) / file.relative_to(hub)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, Path(local_dir) / file.relative_to(hub))
        return local_dir

    class Api:
        def dataset_info(self, repo: str) -> huggingface_hub.hf_api.DatasetInfo:
            return huggingface_hub.hf_api.DatasetInfo(id=repo, sha=f"commit-of-{repo}", tags=[])

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    benchmark, _ = read_benchmark("mmeb-v1")
    task = benchmark.only(["CIRR"]).tasks[0]
    fetch_task(task, data, download)
    name = "TIGER-Lab/MMEB-eval"
    assert asked == [
        (name, f"commit-of-{name}", ["CIRR/*"], "dataset"),
        (name, f"commit-of-{name}", ["images.zip"], "dataset"),
    ]
    assert (data / "CIRR/test-00000-of-00001.parquet").is_file()
    assert read_revisions(data) == {name: f"commit-of-{name}"}
    assert benchmark.facts(data)["data_revision"] == f"{name}@commit-of-{name}"
    assert benchmark.facts(tmp_path)["data_revision"] == f"{name}@not recorded"
    # What is there stays at its revision, though the hub moves on.
    (data / "revisions.json").write_text(json.dumps({name: "earlier"}))
    fetch_task(task, data, download, media=False)
    assert asked[-1][1] == "earlier"
    pinned = task.model_copy(update={"revision": "other"})
    with pytest.raises(UserError, match="holds TIGER-Lab/MMEB-eval at earlier, not other"):
        fetch_task(pinned, data, download, media=False)


def test_sets_that_share_files_are_fetched_to_their_place_and_checked_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = read_benchmark("mmeb-v3")[0].only(["FollowIR/core17-instructions"]).tasks[0]
    asked = []

    class Api:
        def dataset_info(self, repo: str) -> huggingface_hub.hf_api.DatasetInfo:
            return huggingface_hub.hf_api.DatasetInfo(id=repo, sha="c0ffee", tags=[])

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    benchmark = read_benchmark("mmeb-v3")[0].only([task.name])
    assert check_data(benchmark, tmp_path)[0].status == "rows missing"
    found = fetch_task(task, tmp_path, lambda **given: str(asked.append((given["local_dir"], given["allow_patterns"]))))
    folder = "text-tasks/FollowIR/core17-instructions"
    files = [f"{folder}/{name}" for name in ("queries.jsonl", "corpus.jsonl", "qrels_og/test.jsonl")]
    assert asked == [(str(tmp_path), files)] and found == read_revisions(tmp_path) == {"TIGER-Lab/MMEB-V3": "c0ffee"}
    assert benchmark.facts(tmp_path)["data_revision"] == "TIGER-Lab/MMEB-V3@c0ffee"
    write_corpus_set(tmp_path, task.name, dict(task.files or {}))
    (ready,) = check_data(benchmark, tmp_path)
    assert (ready.status, ready.num_queries, ready.num_inputs) == ("ready", 12, 27)


def test_the_size_of_a_download_counts_shared_files_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"OK-VQA/test.parquet": 10, "GQA/test.parquet": 200, "CIRR/test.parquet": 3000, "images.zip": 40_000}

    class Api:
        def dataset_info(self, repo: str, files_metadata: bool) -> huggingface_hub.hf_api.DatasetInfo:
            files = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            return huggingface_hub.hf_api.DatasetInfo(id=repo, sha="c0ffee", tags=[], siblings=files)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    tasks = read_benchmark("mmeb-v1")[0].only(["OK-VQA", "GQA"]).tasks
    assert download_size(tasks) == (3, 40_210)
    assert download_size(tasks, media=False) == (2, 210)
    done = CliRunner().invoke(app, ["data", "fetch", "mmeb-v1", "--data", "none", "--task", "CIRR", "--size"])
    assert done.stdout == "mmeb-v1: 43.0 kB in 2 files\n" and not Path("none").exists()


class Unreachable(Exception):
    """An error of an HTTP library, which has no base class in common with Python's own."""


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def dataset_info(self, repo: str) -> None:
            raise Unreachable("no route\nsecond line")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    task = read_benchmark("mmeb-v1")[0].tasks[0]
    with pytest.raises(UserError, match=r"TIGER-Lab/MMEB-eval: could not be fetched from the hub \(no route\)"):
        fetch_task(task, tmp_path, lambda **_: "")
