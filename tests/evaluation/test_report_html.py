"""The HTML report: it is self-contained, escapes its input, and shows the results."""

import base64
import io
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from evaluation.toys import ColourEncoder, ConstantEncoder
from PIL import Image

from vlm2vec.evaluation.benchmark import Benchmark, EvalTask
from vlm2vec.evaluation.evaluate import Sample, TaskResult, evaluate, results_json
from vlm2vec.evaluation.report import opening_of, write_html
from vlm2vec.evaluation.report_html import loss_chart
from vlm2vec.media.text import breakable
from vlm2vec.types import EmbeddingInput, EvalQuery

Toy = tuple[Benchmark, dict[str, list[EvalQuery]]]
TASK = EvalTask(name="Words", meta_task="vqa", split="ood", metric="hit@1")


class Page(HTMLParser):
    """What tests ask of a page: its tags with attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(path: Path, result: TaskResult, name: str = "model", title: str = "Title") -> Page:
    benchmark = Benchmark(name="b", tasks=[result.task])
    write_html(path, title, {name: results_json(name, benchmark, [result])}, [result], {}, {})
    return Page(path.read_text())


def result_of(query: str, *candidates: tuple[str, float, bool], gold: str = "gold") -> TaskResult:
    top = tuple((EmbeddingInput(text=text), cosine, is_gold) for text, cosine, is_gold in candidates)
    sample = Sample(EmbeddingInput(text=query), EmbeddingInput(text=gold), top)
    return TaskResult(TASK, 0.5, 0.1, 10, 10, 1.0, [sample])


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def toy_page(toy: Toy, toy_folder: Path) -> Page:
    benchmark, tasks = toy
    results = evaluate(ColourEncoder(), benchmark, tasks)
    path = toy_folder / "report.html"
    columns = {"old": results_json("old", benchmark, evaluate(ConstantEncoder(), benchmark, tasks))}
    columns["new"] = results_json("new", benchmark, results)
    curves = {"new": [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 1.5}], "old": [{"step": 20, "loss": 2.0}]}
    write_html(path, "Colours", columns, results, curves, {"machine": "2 cores", "seed": 7, "url": None})
    return Page(path.read_text())


def test_images_are_inlined_small_and_readable(toy_page: Page) -> None:
    images = toy_page.all("img")
    # Five queries of `Find` with five candidate images each, five query images of `Name`.
    assert len(images) == 30
    for image in images:
        head, _, body = (image["src"] or "").partition(",")
        assert head.startswith("data:image/")
        shown = Image.open(io.BytesIO(base64.b64decode(body)))
        assert max(shown.size) <= 240
        assert str(shown.width) == image["width"]


def test_every_image_has_an_alternative_text_without_folders(toy_page: Page) -> None:
    texts = [image["alt"] or "" for image in toy_page.all("img")]
    assert "Query image: red" in texts
    assert not any("/" in text for text in texts)


def test_the_page_fetches_nothing(toy_page: Page) -> None:
    assert not {tag for tag, _ in toy_page.tags} & {"script", "link", "iframe", "object"}
    for _, attributes in toy_page.tags:
        assert (attributes.get("src") or "data:").startswith("data:")
    assert "url(" not in toy_page.text
    assert "@import" not in toy_page.text


def test_links_lead_to_places_on_the_page_and_to_the_original_images(toy_page: Page, toy_folder: Path) -> None:
    places = {attributes.get("id") for _, attributes in toy_page.tags}
    links = [link["href"] or "" for link in toy_page.all("a")]
    assert all(link[1:] in places for link in links if link.startswith("#"))
    files = {link for link in links if not link.startswith("#")}
    assert files and all((toy_folder / unquote(link)).is_file() and not link.startswith("/") for link in files)


def test_the_page_opens_with_model_recipe_and_date(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model: {base: compact}\nlora: {rank: 8}\ntrain: {steps: 60, batch_size: 32}\n"
    )
    model, recipe = opening_of(str(tmp_path))
    assert re.fullmatch(rf"Model {tmp_path}\. Evaluated \d{{4}}-\d\d-\d\d \d\d:\d\d UTC\.", model)
    assert recipe == f"Recipe {tmp_path / 'recipe.yaml'}: compact, LoRA of rank 8, 60 steps of 32 pairs."
    assert len(opening_of("compact")) == 1


def test_intervals_and_further_cutoffs_are_beside_the_score(tmp_path: Path) -> None:
    result = result_of("q", ("gold", 0.9, True))
    result.interval, result.metrics = (0.402, 0.604), {"hit@1": 0.5, "hit@5": 0.7, "hit@10": 0.8}
    text = page_of(tmp_path / "r.html", result).text
    assert "hit@1 50.0 (40.2 to 60.4), hit@5 70.0, hit@10 80.0, chance 10.0" in text
    assert "50.0 40.2 to 60.4" in text  # in the table, too


def test_hits_can_be_hidden_without_a_script(tmp_path: Path) -> None:
    page = page_of(tmp_path / "r.html", result_of("q", ("gold", 0.9, True)))
    assert [box["id"] for box in page.all("input")] == ["misses"]
    assert [card["class"] for card in page.all("article")] == ["card sheet is-hit"]
    assert "main:has(#misses:checked) .card.is-hit { display: none; }" in page.text


def test_bars_are_drawn_on_the_range_of_the_data(tmp_path: Path) -> None:
    page = page_of(tmp_path / "r.html", result_of("q", ("gold", 0.9, True)))
    widths = [float((div["style"] or "").split()[1][:-1]) for div in page.all("div") if div.get("class") == "fill"]
    assert widths == [pytest.approx(100 * 10 / 50), pytest.approx(100)]  # chance 10 and score 50, on 0 to 50 percent


@pytest.mark.parametrize("name", ["runs/my_run-2/step.5", "plain", "<b>/x"])
def test_a_name_breaks_after_separators_alone(name: str) -> None:
    shown = str(breakable(name))
    assert unescape(shown.replace("<wbr>", "")) == name
    assert shown.count("<wbr>") == len(re.findall(r"[/_.-](?=.)", name)) and "<b>" not in shown


def test_confusions_are_counted_where_golds_repeat() -> None:
    labels = tuple(EmbeddingInput(text=text) for text in ("red", "blue", "green"))
    seen = [("one blue", 0), ("two blue", 0), ("one red", 0), ("one green", 1)]  # (what the encoder sees, the gold)
    queries = [EvalQuery(EmbeddingInput(text=text), labels, (gold,)) for text, gold in seen]
    task = EvalTask(name="Name", meta_task="classification", split="ind", metric="hit@1")
    [result] = evaluate(ColourEncoder(), Benchmark(name="b", tasks=[task]), {"Name": queries})
    assert result.confusions == [("red", "blue", 2)]


def test_headings_tables_and_facts_are_there(toy_page: Page) -> None:
    headings = [tag for tag, _ in toy_page.tags if tag in ("h1", "h2", "h3")]
    assert headings == ["h1", "h2", "h2", "h2", "h2", "h3", "h3", "h2"]
    assert "old is ahead of new on no task." in toy_page.text
    assert "machine 2 cores seed 7" in toy_page.text
    assert "<|image_1|>" not in toy_page.text


def test_the_loss_is_drawn_once_a_run_with_labels(toy_page: Page) -> None:
    lines = toy_page.all("polyline")
    assert len(lines) == 2
    assert len((lines[0]["points"] or "").split()) == 2
    assert "new: from 3.000 to 1.500." in toy_page.text


def test_text_is_escaped_wherever_it_comes_from(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    result = result_of(evil, (evil, 0.9, True), gold=evil)
    page = page_of(tmp_path / "r.html", result, name=evil, title=evil)
    assert not page.all("script")
    assert page.text.replace("\n", "").count(evil) >= 4


def test_the_gold_is_marked_in_words_among_the_candidates(tmp_path: Path) -> None:
    page = page_of(tmp_path / "r.html", result_of("q", ("no", 0.9, False), ("gold", 0.8, True)))
    assert "Miss: the gold is number 2" in page.text
    assert "gold 2. cosine 0.8000 ✓ gold" in page.text
    assert "The gold" not in page.text.split("Miss:")[1]


def test_the_gold_is_shown_apart_where_it_is_not_among_the_first(tmp_path: Path) -> None:
    page = page_of(tmp_path / "r.html", result_of("q", ("no", 0.9, False), ("nor this", 0.8, False), gold="the one"))
    assert "Miss: the gold is not among the first 2" in page.text
    assert "The gold the one ✓ gold" in page.text


def test_a_gold_that_ties_is_told_as_a_miss_as_it_is_scored(tmp_path: Path) -> None:
    page = page_of(tmp_path / "r.html", result_of("q", ("gold", 0.9, True), ("also", 0.9, False)))
    assert "Miss: another candidate ties with the gold" in page.text


def test_cosines_that_are_not_numbers_are_told_as_a_miss(tmp_path: Path) -> None:
    nan = float("nan")
    assert "Miss:" in page_of(tmp_path / "r.html", result_of("q", ("gold", nan, True), ("also", nan, False))).text


def test_a_long_text_is_cut(tmp_path: Path) -> None:
    page = page_of(tmp_path / "r.html", result_of("word " * 1000, ("gold", 0.9, True)))
    assert "word…" in page.text
    assert page.text.count("word") < 100


def test_a_log_without_losses_draws_nothing() -> None:
    assert loss_chart({}) is None
    assert loss_chart({"run": [{"step": 5, "train_loss": 1.0}, {"step": 6, "loss": float("nan")}]}) is None


@pytest.mark.parametrize("losses", [[2.0], [2.0, 2.0, 2.0], [0.0, 0.0], [1e-6, 3e-6], [5000.0, 1.0]])
def test_any_curve_stays_inside_its_axes(losses: list[float]) -> None:
    chart = loss_chart({"run": [{"step": i, "loss": loss} for i, loss in enumerate(losses, start=1)]})
    assert chart is not None
    for point in chart.curves[0].points.split():
        x, y = map(float, point.split(","))
        assert chart.left <= x <= chart.right
        assert chart.top <= y <= chart.bottom
    assert 2 <= len(chart.y_ticks) <= 9
    assert len({label for _, label in chart.y_ticks}) == len(chart.y_ticks)
