"""GUI control tasks of MMEB-V3: prompts, screenshots in order, and all candidates for every query."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
from data.layouts import TOKEN, draw_image, write_rows

from vlm2vec.data.mmeb.gui import read_gui_set
from vlm2vec.data.mmeb.quirks import Quirks
from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import read_benchmark
from vlm2vec.evaluation.data_check import check_data
from vlm2vec.evaluation.tasks import read_task

NAMES = [f"guiact/{i}.png" for i in range(6)]


def write_gui_set(root: Path, collection: str = "GAE-GUIAct", split: str = "q2t") -> list[dict[str, Any]]:
    for number, name in enumerate(NAMES):
        draw_image(root / "gui-tasks" / collection.removeprefix("GAE-") / name, number)
    step = f"{TOKEN} click\n"
    queries = [
        {"qry_id": "q0", "qry_text": "open the menu", "qry_image_path": "", "pos_id": "t1", "pos_text": step * 2,
         "pos_image_path": str(NAMES[:2]), "retrieval_type": split},
        {"qry_id": "q1", "qry_text": f"{TOKEN}\nnext?", "qry_image_path": NAMES[2], "pos_id": "t2", "pos_text": step,
         "pos_image_path": f"['{NAMES[3]}']", "retrieval_type": split},
    ]  # fmt: skip
    corpus = [
        {"cand_id": "t2", "cand_text": "another text of the same trajectory", "cand_image_path": NAMES[5]},
        {"cand_id": "t0", "cand_text": step, "cand_image_path": NAMES[4]},
    ]
    place = root / "gui-tasks" / collection
    write_rows(place / f"queries/{split}-00000-of-00001.parquet", queries)
    write_rows(place / f"corpus/{split}-00000-of-00001.parquet", corpus)
    write_rows(place / "queries/other-00000-of-00001.parquet", [{"qry_text": "of another split"}])
    return queries


def names_of(item: Any) -> list[str]:
    return [Path(image.member or image.path).name for image in item.images]


def test_every_query_has_all_targets_and_the_corpus_as_candidates_each_id_once(tmp_path: Path) -> None:
    write_gui_set(tmp_path)
    first, second = read_gui_set(tmp_path, "GAE-GUIAct", "q2t")
    assert first.candidates is second.candidates and (first.relevant, second.relevant) == ((0,), (1,))
    assert (first.query.text, first.query.images) == ("open the menu", ())
    assert (second.query.text, names_of(second.query)) == (f"{TOKEN}\nnext?", ["2.png"])
    texts = [item.text for item in first.candidates]
    assert texts == ["<|image_1|> click\n<|image_2|> click\n", f"{TOKEN} click\n", f"{TOKEN} click\n"]
    assert [names_of(item) for item in first.candidates] == [["0.png", "1.png"], ["3.png"], ["4.png"]]
    assert all(image.exists() and image.rules for item in first.candidates for image in item.images)


def test_screenshots_are_read_from_the_published_zip(tmp_path: Path) -> None:
    write_gui_set(tmp_path)
    with zipfile.ZipFile(tmp_path / "gui-tasks/GUIAct.zip", "w") as archive:
        for name in NAMES:
            archive.write(tmp_path / "gui-tasks/GUIAct" / name, name)
            (tmp_path / "gui-tasks/GUIAct" / name).unlink()
    queries = read_gui_set(tmp_path, "GAE-GUIAct", "q2t")
    assert all(image.exists() for item in queries[0].candidates for image in item.images)


def test_the_third_table_reads_and_checks_all_eight_tasks(tmp_path: Path) -> None:
    tasks = [task for task in read_benchmark("mmeb-v3")[0].tasks if task.meta_task == "gui_control"]
    for task in tasks:
        write_gui_set(tmp_path, str(task.config), str(task.hub_split))
        assert len(read_task(task, tmp_path, Quirks())[0].candidates) == 3
    benchmark = read_benchmark("mmeb-v3")[0].only([task.name for task in tasks])
    assert len(tasks) == 8 and [check.status for check in check_data(benchmark, tmp_path)] == ["ready"] * 8


def test_mistakes_name_the_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no queries of split q2t"):
        read_gui_set(tmp_path, "GAE-GUIAct", "q2t")
    (query, _) = write_gui_set(tmp_path)
    file = tmp_path / "gui-tasks/GAE-GUIAct/queries/q2t-00000-of-00001.parquet"
    write_rows(file, [{**query, "pos_text": f"{TOKEN} only one"}])
    with pytest.raises(UserError, match=r"row 0, field pos_image_path: 2 images but 1 <\|image_1\|> in the text"):
        read_gui_set(tmp_path, "GAE-GUIAct", "q2t")
    write_rows(file, [{"qry_text": "a"}])
    with pytest.raises(UserError, match="column qry_image_path is missing"):
        read_gui_set(tmp_path, "GAE-GUIAct", "q2t")
