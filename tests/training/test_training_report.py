"""The report of a training run: its opening, its curves, and that it is self-contained."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vlm2vec.charts import line_chart
from vlm2vec.training.report import RunFacts, write_report

RECIPE = "train: {steps: 5} # <b>"


class Page(HTMLParser):
    """Tags with their attributes, and the text in one line."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"

    def count(self, tag: str, kind: str) -> int:
        return sum(name == tag and (attributes.get("class") or "") == kind for name, attributes in self.tags)


def page_of(folder: Path, first: float = 1.9, scores: dict[int, float] | None = None, batch: int = 8) -> Page:
    log = [{"step": step, "loss": first - (step - 1) / 10, "memory_mib": 900} for step in range(1, 6)]
    facts = RunFacts("run <1>", ["Model compact"], RECIPE, batch, scores or {}, "overall")
    write_report(folder / "report.html", facts, log)
    return Page(folder / "report.html")


def test_the_page_opens_with_the_scores_and_the_first_loss_beside_log_of_the_batch(tmp_path: Path) -> None:
    page = page_of(tmp_path, scores={0: 0.1, 5: 0.253})
    opening = page.text[: page.text.index("The first logged loss")]
    assert "run <1> Model compact" in opening
    assert "Held-out score, step 0 10.0 % Held-out score, step 5 25.3 %" in opening
    assert "First loss 1.900 log(8) 2.079 Last loss 1.500" in opening


def test_every_recorded_curve_has_axes_ticks_and_its_range(tmp_path: Path) -> None:
    page = page_of(tmp_path, scores={0: 0.1, 5: 0.253})
    assert page.count("polyline", "curve") == 3  # loss, held-out score, memory
    assert page.count("path", "axis") == 3
    assert page.count("line", "level") == 1  # log of the batch size, in the chart of the loss
    assert (
        "From 1.900 to 1.500." in page.text
        and "From 900 to 900." in page.text
        and "overall, percent. From 10.0 to 25.3." in page.text
    )


def test_the_page_loads_nothing_and_escapes_what_it_shows(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"} and "http" not in page.source
    assert RECIPE in page.text and "<b>" not in page.source


@pytest.mark.parametrize(("first", "warns"), [(math.log(8), False), (1.5 * math.log(8) + 0.01, True)])
def test_a_first_loss_far_above_log_of_the_batch_is_a_warning(first: float, warns: bool, tmp_path: Path) -> None:
    page = page_of(tmp_path, first)
    assert ("It is far above" in page.text) is warns
    assert page.count("div", "sheet remark warn") == warns


def test_a_reference_line_is_inside_the_axes_and_where_its_value_is() -> None:
    chart = line_chart({"loss": [(1, 1.0), (2, 3.0)]}, (2.0, "two"))
    assert chart is not None and chart.level is not None
    (low, _), (high, _) = chart.y_ticks[0], chart.y_ticks[-1]
    ends = [float(point.split(",")[1]) for point in chart.curves[0].points.split()]
    assert chart.level[0] == pytest.approx(sum(ends) / 2, abs=0.1)
    assert high <= chart.level[0] <= low


def test_points_that_are_not_finite_are_left_out() -> None:
    assert line_chart({"loss": [(1, math.nan)]}) is None
    chart = line_chart({"loss": [(1, 2.0), (2, math.inf), (3, 1.0)]})
    assert chart is not None and len(chart.curves[0].points.split()) == 2


def test_ticks_of_small_values_are_short_and_exact() -> None:
    chart = line_chart({"rate": [(1, 0.0), (2, 1e-3)]})
    assert chart is not None
    assert [label for _, label in chart.y_ticks] == ["0", "2e-4", "4e-4", "6e-4", "8e-4", "1e-3"]
