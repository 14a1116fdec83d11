"""An invalid benchmark file gives a one-line error that names the file and the field."""

from pathlib import Path

import pytest
import yaml
from evaluation.toys import write_toy_benchmark

from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import load_benchmark
from vlm2vec.evaluation.evaluate import read_tasks


def message_of(path: Path, data: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        benchmark, folder = load_benchmark(path, data)
        read_tasks(benchmark, folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_valid_file_gives_its_tasks_and_the_data_folder_beside_it(toy_file: Path) -> None:
    benchmark, folder = load_benchmark(toy_file)
    assert [task.name for task in benchmark.tasks] == ["Find", "Name"]
    assert folder == toy_file.parent / "eval"


def test_a_given_data_folder_comes_before_the_one_in_the_file(toy_file: Path, tmp_path: Path) -> None:
    assert load_benchmark(toy_file, tmp_path)[1] == tmp_path


def test_an_unknown_key_is_named_with_the_file(tmp_path: Path) -> None:
    message = message_of(write_toy_benchmark(tmp_path, colour="red"))
    assert "benchmark.yaml" in message
    assert "tasks.0.colour" in message


@pytest.mark.parametrize(
    ("field", "value"), [("metric", "hit@7"), ("meta_task", "cooking"), ("split", "both"), ("num_queries", "many")]
)
def test_a_wrong_value_is_named_with_the_file(tmp_path: Path, field: str, value: str) -> None:
    message = message_of(write_toy_benchmark(tmp_path, **{field: value}))
    assert "benchmark.yaml" in message
    assert f"tasks.0.{field}" in message


@pytest.mark.parametrize(("field", "value", "found"), [("num_queries", 61, "60"), ("num_candidates", 9, "10")])
def test_a_count_that_is_not_the_stated_one_is_named_with_the_set(
    tmp_path: Path, field: str, value: int, found: str
) -> None:
    message = message_of(write_toy_benchmark(tmp_path, **{field: value}))
    assert f"Find: {field} is {found}" in message
    assert str(value) in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in message_of(tmp_path / "none.yaml")


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: [unclosed\ntasks: {")
    assert str(path) in message_of(path)


def test_a_missing_data_folder_is_named_with_the_option_that_gives_it(toy_file: Path, tmp_path: Path) -> None:
    message = message_of(toy_file, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message
    assert "--data" in message


def test_a_file_without_a_data_folder_asks_for_one(toy_file: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(toy_file.read_text())
    del content["source"]
    path = tmp_path / "benchmark.yaml"
    path.write_text(yaml.safe_dump(content))
    assert "--data" in message_of(path)


def test_a_task_without_its_set_names_the_sets_that_are_there(tmp_path: Path) -> None:
    message = message_of(write_toy_benchmark(tmp_path, name="Lost"))
    assert "Lost" in message
    assert "Find, Name" in message


def test_switches_can_be_changed_and_a_wrong_one_is_named(toy_file: Path) -> None:
    benchmark, folder = load_benchmark(toy_file)
    changed = benchmark.with_switches({"identity": "content", "frames": 4})
    assert (changed.quirks.identity, changed.quirks.frames, changed.quirks.whitespace) == ("content", 4, "published")
    assert "identity content" in changed.facts(folder)["data_switches"]
    for wrong in ({"identity": "none"}, {"frame": 4}, {"frames": 0}):
        with pytest.raises(UserError, match="there are: identity, duplicates, whitespace"):
            benchmark.with_switches(wrong)


def write(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_set_of_records_needs_no_more_than_its_reader_and_is_scored(tmp_path: Path) -> None:
    (tmp_path / "Beach.jsonl").write_text('{"query": "red", "candidates": ["red", "blue"]}\n')
    for tasks in ({"Beach": {"reader": "records"}}, [{"name": "Beach", "reader": "records"}]):
        file = write(tmp_path / "mine.yaml", {"name": "mine", "source": {"eval": "."}, "tasks": tasks})
        benchmark, folder = load_benchmark(file)
        task = benchmark.to_score().tasks[0]
        assert (task.metric, task.meta_task) == ("hit@1", "retrieval")
        assert len(read_tasks(benchmark, folder)["Beach"]) == 1


def test_a_benchmark_without_a_task_to_score_is_refused(tmp_path: Path) -> None:
    tasks = {"Beach": {"reader": None}, "Lake": {"reader": None}}
    file = write(tmp_path / "mine.yaml", {"name": "mine", "source": {"eval": "."}, "tasks": tasks})
    with pytest.raises(UserError, match="nothing to score: Beach, Lake"):
        load_benchmark(file)[0].to_score()
    with pytest.raises(UserError, match="nothing to score: Lake"):
        load_benchmark(file)[0].to_score(["Lake"])


def test_a_set_without_queries_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Beach.jsonl").write_text("\n")
    content = {"name": "mine", "source": {"eval": "."}, "tasks": {"Beach": {"reader": "records"}}}
    assert "Beach: no queries there" in message_of(write(tmp_path / "mine.yaml", content))


def test_all_missing_fields_are_in_one_message_with_an_example(tmp_path: Path) -> None:
    message = message_of(write(tmp_path / "mine.yaml", {"tasks": [{"reader": "records"}, {"reader": "records"}]}))
    for field in ("name", "tasks.0.name", "tasks.1.name"):
        assert f"{field}: is missing" in message
    example = message.partition("the smallest benchmark: ")[2]
    assert load_benchmark(write(tmp_path / "example.yaml", yaml.safe_load(example)), tmp_path)[0].name == "mine"


def test_a_benchmark_that_extends_itself_is_one_line(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    for path, other in ((first, second), (second, first)):
        write(path, {"name": path.stem, "extends": str(other), "tasks": [{"name": "T", "reader": "records"}]})
    assert message_of(first) == f"{first}: extends itself: first.yaml > second.yaml > first.yaml"


def test_near_misses_of_names_and_keys_are_suggested(tmp_path: Path, toy_file: Path) -> None:
    assert "did you mean mmeb-v1?" in message_of(Path("mmeb_v1"))
    assert "did you mean num_queries?" in message_of(write_toy_benchmark(tmp_path, num_querys=60))
    with pytest.raises(UserError, match=r"no such task in .*; did you mean Find"):
        load_benchmark(toy_file)[0].only(["find"])


def test_a_shipped_benchmark_without_its_data_names_the_command_that_fetches_it() -> None:
    with pytest.raises(UserError, match=r"vlm2vec data fetch mmeb-v1 --data FOLDER \(--size: how much"):
        load_benchmark("mmeb-v1")
