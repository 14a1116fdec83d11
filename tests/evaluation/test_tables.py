"""Every row of the shipped tables: its facts, and that its reader reads the set's layout and scores as it should."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data.layouts import write_corpus_set, write_image_set, write_video_set, write_visdoc_set
from evaluation.toys import ConstantEncoder, RandomEncoder

from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import Benchmark, EvalTask, load_benchmark, read_benchmark, shipped_benchmarks
from vlm2vec.evaluation.evaluate import evaluate, groups_of
from vlm2vec.evaluation.tasks import TaskReader, read_task
from vlm2vec.evaluation.upstream import UPSTREAM_NAMES

TABLES = {name: read_benchmark(name)[0] for name in shipped_benchmarks()}
ROWS = [
    pytest.param(name, task, id=f"{name}-{task.name}") for name in ("mmeb-v1", "mmeb-v2") for task in TABLES[name].tasks
]
NEW_IN_THIRD = [task for task in TABLES["mmeb-v3"].tasks if task.reader == "corpus"]
# The reference repository's own list: what runs in the leaderboard's 78.
OOD = {"Place365", "ImageNet-A", "ImageNet-R", "ObjectNet", "Country211", "ScienceQA", "VizWiz", "GQA", "TextVQA"}
OOD |= {"OVEN", "FashionIQ", "EDIS", "Wiki-SS-NQ", "Visual7W-Pointing", "RefCOCO", "RefCOCO-Matching"}


def count(benchmark: Benchmark, field: str) -> dict[str, int]:
    return dict(Counter(getattr(task, field) for task in benchmark.tasks))


def test_the_first_table_has_36_tasks_in_the_published_groups() -> None:
    table = TABLES["mmeb-v1"]
    assert count(table, "meta_task") == {"classification": 10, "vqa": 10, "retrieval": 12, "grounding": 4}
    assert count(table, "split") == {"ind": 20, "ood": 16}
    assert {task.name for task in table.tasks if task.split == "ood"} == OOD
    assert {task.num_queries for task in table.tasks} == {1000}


def test_the_second_table_has_78_tasks_and_the_first_ones_images() -> None:
    first, second = TABLES["mmeb-v1"], TABLES["mmeb-v2"]
    assert count(second, "modality") == {"image": 36, "video": 18, "visdoc": 24}
    meta = count(second, "meta_task")
    assert [meta[name] for name in ("video_classification", "video_qa", "video_retrieval", "moment_retrieval")] == [
        5,
        5,
        5,
        3,
    ]
    assert [meta[name] for name in ("vidore_v1", "vidore_v2", "visrag", "visdoc_ood")] == [10, 4, 6, 4]
    shared = ("name", "meta_task", "split", "metric", "scope", "num_candidates", "instruction")
    images = [task for task in second.tasks if task.modality == "image"]
    assert [[getattr(t, f) for f in shared] for t in images] == [[getattr(t, f) for f in shared] for t in first.tasks]
    assert sum(task.num_queries or 0 for task in second.tasks if task.modality == "video") == 34_940


def test_the_third_table_has_190_tasks_and_says_of_each_without_a_reader_what_is_missing() -> None:
    third = TABLES["mmeb-v3"]
    new = third.tasks[78:]
    assert len(third.tasks) == 190 and len({task.name for task in third.tasks}) == 190
    assert [task.name for task in third.tasks[:78]] == [task.name for task in TABLES["mmeb-v2"].tasks]
    assert count(Benchmark(name="new", tasks=new), "modality") == {"text": 53, "audio": 11, "agent": 47, "image": 1}
    assert Counter(task.reader for task in new) == {"corpus": 89, "gui": 8, None: 15}
    for task in new:
        assert task.source == "TIGER-Lab/MMEB-V3" and task.revision is None
        assert task.metric == ("ndcg_linear@5" if task.modality == "text" else "hit@1")
        if task.reader is None:
            assert task.note
            with pytest.raises(UserError, match=r"has no reader yet; name other tasks with --task"):
                read_task(task, Path(), third.quirks)
        else:
            assert task.scope == "global"
            assert (
                (task.config and task.hub_split)
                if task.reader == "gui"
                else (task.files and task.query and task.target)
            )


def test_a_corpus_row_without_its_files_is_refused() -> None:
    with pytest.raises(ValueError, match="reader corpus needs files"):
        EvalTask(name="x", meta_task="text_retrieval", metric="hit@1", reader="corpus")


@pytest.mark.parametrize(("table", "task"), ROWS)
def test_every_row_states_its_facts(table: str, task: EvalTask) -> None:
    assert task.source and task.source.count("/") == 1 and task.hub_split in ("test", "train", "val")
    assert task.media_source and task.instruction and task.query and task.target
    assert task.reader and task.num_queries and task.num_queries >= 50
    assert task.metric == ("ndcg_linear@5" if task.modality == "visdoc" else "hit@1")
    local = task.modality == "image" or task.meta_task in ("video_qa", "moment_retrieval") or task.name == "SmthSmthV2"
    assert task.scope == ("local" if local else "global")
    assert (task.split is not None) == (task.modality == "image")
    assert task.revision is None  # none could be pinned when the tables were written; fetching records one
    if "I" not in task.target and "V" not in task.target:
        assert task.target == "T" and task.target_instruction is None
    assert len(groups_of(TABLES[table].tasks)[task.name]) in (2, 3)


def test_names_are_those_of_the_published_score_files() -> None:
    assert {task.name for task in TABLES["mmeb-v2"].tasks} == set(UPSTREAM_NAMES)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with every set of the tables that has a reader, twelve queries each, in its own layout."""
    root = tmp_path_factory.mktemp("mmeb")
    for task in TABLES["mmeb-v2"].tasks:
        if task.reader == "mmeb":
            write_image_set(root / "v1", task.name, str(task.kind), with_instructions=False)
            write_image_set(root / "v2", task.name, str(task.kind), with_instructions=True)
        elif task.reader == "video":
            write_video_set(root / "v2", task.name, num_frames=1)
        else:
            write_visdoc_set(root / "v2", task.name)
    for task in NEW_IN_THIRD:
        write_corpus_set(root / "v3", task.name, dict(task.files or {}))
    return root


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_guessing_scores_chance_and_one_vector_for_all_scores_zero_on_every_task(version: str, miniature: Path) -> None:
    benchmark, folder = load_benchmark(f"mmeb-{version}", miniature / version)
    chosen = NEW_IN_THIRD if version == "v3" else benchmark.tasks
    smaller = [task.model_copy(update={"num_queries": None, "num_candidates": None}) for task in chosen]
    benchmark = benchmark.model_copy(update={"tasks": smaller})
    tasks = dict(TaskReader(benchmark, folder))
    constant = evaluate(ConstantEncoder(), benchmark, tasks)
    assert {result.task.name: result.score for result in constant} == {task.name: 0.0 for task in benchmark.tasks}
    runs = [evaluate(RandomEncoder(seed), benchmark, tasks) for seed in range(3)]
    scores = np.array([[result.score for result in run] for run in runs])
    chances = np.array([result.chance for result in runs[0]])
    assert ((chances > 0) & (chances < 0.6)).all()
    # 36 guesses a task are few; their deviation from chance over all tasks is small.
    assert abs((scores - chances).mean()) < 0.03
    assert (abs(scores.mean(axis=0) - chances) < 5 * np.sqrt(chances * (1 - chances) / 36) + 0.05).all()


def test_counts_that_are_not_the_stated_ones_stop_the_evaluation(miniature: Path) -> None:
    benchmark, folder = load_benchmark("mmeb-v2", miniature / "v2")
    with pytest.raises(UserError, match=r"OK-VQA: num_queries is 12, but the benchmark states 1000 in mmeb-v2"):
        TaskReader(benchmark, folder)["OK-VQA"]
