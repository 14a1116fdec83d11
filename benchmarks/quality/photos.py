"""Produces the tables of docs/explain/results.md: VLM and dual encoder of the same components on photographs, and
ablations of the training settings. Every run is saved; a restart continues after the last completed run.

    python benchmarks/quality/photos.py --data photos-mmeb --output runs/quality [--stage ablate] [--seeds 0 1 2]

1. select    choose the settings of both models from the same grid with seed 0, scored on a held-out tenth of the
             training queries; no evaluation set is used.
2. table     train with the chosen settings on all pairs, every seed; report mean and range of the scores over seeds.
3. curve     train with fewer steps, first seed: quality against training time, curve.svg.
4. ablate    change one setting of the chosen VLM at a time, every seed.

`--stage curve` and `--stage ablate` each run stages 1 and 2 first; without `--stage` all stages are run.
`--set key=value` changes the recipe of every run (such as model.options.num_layers=1, for a smoke test). `--task`
selects evaluation sets. `--grid "key=value key=value"`, once per point, replaces the grid; quote values with blanks.
Other folders in this layout work, too, such as the demo benchmark with `--recipe recipes/demo.yaml`.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from held_out import Rows, is_held, question, rewrite, write_held_out

from vlm2vec.evaluation.run import score_model
from vlm2vec.training.config import Recipe, load_recipe
from vlm2vec.training.mining import mine
from vlm2vec.training.nearest import MiningRule
from vlm2vec.training.run import train

PLACEHOLDER = "<|image_1|>"
HELD_CANDIDATES, HELD_QUERIES = 200, 200  # maximum numbers per set
MODELS = ("vlm", "dual encoder")
TRIED = (("2e-3", 0.1), ("2e-3", 0.05), ("4e-3", 0.1))
GRID = [f"train.learning_rate={rate} train.temperature={t}" for rate, t in TRIED]
Scores = dict[str, float]


@dataclass
class Bench:
    """Settings that all runs share."""

    recipe: Path
    data: Path
    output: Path
    changes: tuple[str, ...]
    tasks: tuple[str, ...]
    grid: tuple[str, ...]
    models: tuple[str, ...] = MODELS
    select_steps: int | None = None

    def run(self, name: str, changes: Iterable[str], root: Path | None = None, held: Path | None = None) -> Scores:
        """Trains and evaluates, unless the result exists; returns hit@1 by task and group."""
        folder = self.output / name
        done = folder / "scores.json"
        if not done.is_file():
            settings = self.settings(changes, root or self.data / "train", folder / "run")
            since, resumed = time.process_time(), (folder / "run").exists()
            train(settings, resume=resumed)
            spent = {} if resumed else {"cpu_seconds": time.process_time() - since}
            done.write_text(json.dumps(self.score(str(folder / "run"), folder / "eval", held) | spent))
            print(f"{name}: overall {100 * json.loads(done.read_text())['overall']:.1f}", flush=True)
        scores: Scores = json.loads(done.read_text())
        return scores

    def settings(self, changes: Iterable[str], root: Path, output: Path) -> Recipe:
        overrides = [*self.changes, *changes, f"data.root={root}", f"output={output}"]
        return load_recipe(self.recipe, overrides)

    @property
    def base(self) -> str:
        """The model that the recipe trains."""
        return self.settings((), self.data / "train", self.output).model.base

    def changes_of(self, model: str, settings: str) -> list[str]:
        """Returns the recipe overrides of a grid point for a model; the dual encoder has the parts of the VLM."""
        dual = [f"model.base={self.base}-dual"] if model == "dual encoder" else []
        return [*dual, *shlex.split(settings)]

    def score(self, model: str, output: Path, held: Path | None = None, **options: Any) -> Scores:
        benchmark = (held or self.data) / "benchmark.yaml"
        vectors = output / "vectors"
        score_model(model, benchmark, output, options=options, cache=vectors, names=() if held else self.tasks)
        shutil.rmtree(vectors)
        results = json.loads((output / "results.json").read_text())
        return {name: task["score"] for name, task in results["tasks"].items()} | results["groups"]


def hold_out(bench: Bench) -> tuple[Path, Path]:
    """Writes training sets without a tenth of their queries, and a benchmark of that tenth."""
    source, output = bench.data / "train", bench.output / "held-out"
    tasks: dict[str, str] = {}

    def kept(name: str, rows: Rows) -> Rows:
        return [row for row in rows if not is_held(row)]

    def asked(name: str, rows: Rows) -> Rows:
        draw = random.Random(f"held out {name}")
        targets = sorted({(row["pos_text"], row["pos_image_path"]) for row in rows})
        pool = draw.sample(targets, min(HELD_CANDIDATES, len(targets)))
        held = [row for row in rows if is_held(row)]
        tasks[name] = "retrieval"
        return [question(row, pool) for row in draw.sample(held, min(HELD_QUERIES, len(held)))]

    return write_held_out(source, output, kept, asked, tasks)


def without_instructions(bench: Bench) -> Bench:
    """Returns the same data without the common prefix of all queries, or all targets, of a set."""
    output = bench.output / "plain"

    def cut(texts: list[str]) -> Callable[[str], str]:
        bare = [text.replace(PLACEHOLDER, "").lstrip("\n") for text in texts if text]
        first, last = min(bare, default=""), max(bare, default="")
        length = next(
            (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
        )
        shared = first[:length] if len(first[:length].split()) > 2 else ""  # a word or two may be chance
        return lambda text: text.replace(shared, "", 1) if shared else text

    def plain_pairs(name: str, rows: Rows) -> Rows:
        query, target = (cut([row[column] for row in rows]) for column in ("qry", "pos_text"))
        return [{**row, "qry": query(row["qry"]), "pos_text": target(row["pos_text"])} for row in rows]

    def plain_queries(name: str, rows: Rows) -> Rows:
        query, target = cut([row["qry_text"] for row in rows]), cut([t for row in rows for t in row["tgt_text"]])
        return [
            {**row, "qry_text": query(row["qry_text"]), "tgt_text": [target(text) for text in row["tgt_text"]]}
            for row in rows
        ]

    rewrite(bench.data / "train", output / "train", "original-*.parquet", plain_pairs, ("images", "images_zip"))
    rewrite(bench.data / "eval", output / "eval", "test-*.parquet", plain_queries, ("images", "images.zip"))
    (output / "benchmark.yaml").write_text((bench.data / "benchmark.yaml").read_text())
    return replace(bench, data=output)


def select(bench: Bench) -> dict[str, list[str]]:
    """Returns the settings with the highest mean on the held-out queries, by model; a grid of one point is not run."""
    if len(bench.grid) == 1:
        return {model: bench.changes_of(model, bench.grid[0]) for model in bench.models}
    root, held = hold_out(bench)
    steps = [f"train.steps={bench.select_steps}"] if bench.select_steps else []
    chosen = {}
    for model in bench.models:
        found = {}
        for settings in bench.grid:
            changes = [*bench.changes_of(model, settings), *steps, "train.seed=0"]
            place = f"select/{model}/{settings.replace(' ', ',')}"
            found[settings] = bench.run(place, changes, root, held)["overall"]
        best = max(found, key=lambda settings: found[settings])
        chosen[model] = bench.changes_of(model, best)
        print(f"{model}: {best} ({100 * found[best]:.1f} on held-out queries; worst {100 * min(found.values()):.1f})")
    return chosen


def table(bench: Bench, chosen: Mapping[str, list[str]], seeds: Sequence[int]) -> str:
    """Returns the scores of every task and group: untrained, and both models over all seeds."""
    columns: dict[str, list[Scores]] = {}
    untrained = bench.output / "table/untrained"
    if not (untrained / "results.json").is_file():
        options = bench.settings((), bench.data / "train", untrained).model.options
        bench.score(bench.base, untrained, **options)
    content = json.loads((untrained / "results.json").read_text())
    columns["untrained"] = [{n: t["score"] for n, t in content["tasks"].items()} | content["groups"]]
    chance = {name: task["chance"] for name, task in content["tasks"].items()}
    for model, changes in chosen.items():
        columns[model] = [bench.run(f"table/{model}/{s}", [*changes, f"train.seed={s}"]) for s in seeds]
    lines = [f"| task | chance | {' | '.join(columns)} |", f"| --- {'| --: ' * (len(columns) + 1)}|"]
    for name in columns["untrained"][0]:
        cells = [shown([scores[name] for scores in runs]) for runs in columns.values()]
        first = f"{100 * chance[name]:.1f}" if name in chance else ""
        lines.append(f"| {name} | {first} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curve(bench: Bench, chosen: Mapping[str, list[str]], seed: int) -> str:
    """Returns and plots the scores by number of steps; each is a separate run whose learning rate decays to zero."""
    steps = bench.settings((), bench.data / "train", bench.output).train.steps
    lines = ["| model | steps | CPU minutes | overall | ind | ood |", f"| --- {'| --: ' * 5}|"]
    series: dict[str, list[tuple[float, float]]] = {model: [] for model in chosen}
    for model, changes in chosen.items():
        for number in (steps // 4, steps // 2, steps):
            place = f"table/{model}/{seed}" if number == steps else f"curve/{model}/{number}"
            scores = bench.run(place, [*changes, f"train.seed={seed}", f"train.steps={number}"])
            minutes = scores.get("cpu_seconds", float("nan")) / 60  # unknown for an interrupted run
            if "cpu_seconds" in scores:
                series[model].append((minutes, 100 * scores["overall"]))
            cells = " | ".join(shown([scores[group]]) for group in ("overall", "ind", "ood") if group in scores)
            lines.append(f"| {model} | {number} | {minutes:.1f} | {cells} |")
    (bench.output / "curve.svg").write_text(drawn(series))
    return "\n".join(lines)


def drawn(series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Plots percent against minutes, one line per model, both axes from zero."""
    width, height, colours = 560, 260, ("#2166ac", "#b2182b")
    across = max(minutes for points in series.values() for minutes, _ in points)
    up = max(score for points in series.values() for _, score in points) * 1.15
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-50 -30 660 340" font-family="sans-serif" font-size="12">',
        '<rect x="-50" y="-30" width="660" height="340" fill="white"/>',
        f'<path d="M0 0V{height}H{width}" fill="none" stroke="#444"/>',
        f'<text x="{width / 2}" y="{height + 36}" text-anchor="middle">CPU minutes of training</text>',
        '<text x="-40" y="-12">hit@1, percent, mean of all tasks</text>',
    ]
    for part in range(5):
        x, y = width * part / 4, height * (1 - part / 4)
        parts.append(f'<text x="{x}" y="{height + 16}" text-anchor="middle">{across * part / 4:.1f}</text>')
        parts.append(f'<text x="-6" y="{y + 4}" text-anchor="end">{up * part / 4:.1f}</text>')
    for colour, (model, points) in zip(colours, series.items(), strict=False):
        at = [(width * minutes / across, height * (1 - score / up)) for minutes, score in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in at]
        parts.append(
            f'<text x="{at[-1][0] - 4:.1f}" y="{at[-1][1] - 10:.1f}" text-anchor="end" fill="{colour}">{model}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def ablations(bench: Bench, settings: Recipe) -> dict[str, dict[str, list[str]]]:
    """Returns the changes to the chosen VLM by question, without no-ops; the number of training pairs is constant."""
    batch, steps, rank = settings.train.batch_size, settings.train.steps, settings.lora.rank if settings.lora else 16
    sizes = {
        f"batch {b}": [f"train.batch_size={b}", f"train.steps={steps * batch // b}"] for b in (batch // 4, batch * 2)
    }
    parts = {f"sub-batches of {p}": ["data.batching=interleaved", f"data.sub_batch_size={p}"] for p in (8, batch // 2)}
    kinds = {"mixed": ["data.batching=mixed"], "one set": ["data.batching=single"], **parts}
    if settings.data.batching in ("mixed", "single"):
        del kinds["mixed" if settings.data.batching == "mixed" else "one set"]
    return {
        "batches": sizes,
        "what a batch is of": kinds,
        "LoRA rank": {str(r): [f"lora.rank={r}", f"lora.alpha={2 * r}"] for r in (rank // 4, rank * 4)},
        "instructions": {"off": []},
        "negatives": {"none explicit": ["data.use_negatives=false"], "mined": []},
        "resolution": {f"{px} px": [f"model.options.image_size={px}"] for px in (128, 224)},
    }


def ablate(bench: Bench, chosen: list[str], seeds: Sequence[int]) -> str:
    """Returns one line per change: overall, in and out of distribution, and the difference to the chosen settings."""
    settings = bench.settings(chosen, bench.data / "train", bench.output)
    base = [bench.run(f"table/vlm/{seed}", [*chosen, f"train.seed={seed}"]) for seed in seeds]
    lines = ["| what | changed to | overall | ind | ood | against chosen |", "| --- | --- | --: | --: | --: | --: |"]
    lines.append(_line("chosen", "", base, base))
    for what, changes in ablations(bench, settings).items():
        for value, change in changes.items():
            here, root = bench, None
            if what == "instructions":
                here = without_instructions(bench)
            if value == "mined":
                root = mined(bench, seeds[0])
            place = f"ablate/{what}/{value}"
            runs = [here.run(f"{place}/{seed}", [*chosen, *change, f"train.seed={seed}"], root) for seed in seeds]
            lines.append(_line(what, value, runs, base))
    return "\n".join(lines)


def mined(bench: Bench, seed: int) -> Path:
    """Writes the training sets with hard negatives mined by the chosen VLM; the folder is complete or absent."""
    root, beside = bench.output / "mined", bench.output / "mined.writing"
    if not root.exists():
        shutil.rmtree(beside, ignore_errors=True)  # left by an interrupted run
        mine(str(bench.output / f"table/vlm/{seed}/run"), bench.data / "train", beside, MiningRule())
        beside.rename(root)
    return root


def _line(question: str, value: str, runs: Sequence[Scores], base: Sequence[Scores]) -> str:
    cells = [shown([scores[group] for scores in runs if group in scores]) for group in ("overall", "ind", "ood")]
    difference = statistics.mean(s["overall"] for s in runs) - statistics.mean(s["overall"] for s in base)
    return f"| {question} | {value} | {' | '.join(cells)} | {100 * difference:+.1f} |"


def shown(values: Sequence[float]) -> str:
    """Formats the mean in percent and the range over the runs."""
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with benchmark.yaml, train and eval")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    parser.add_argument("--recipe", type=Path, default=Path("recipes/photos.yaml"))
    parser.add_argument(
        "--stage", choices=("select", "table", "curve", "ablate", "all"), default="all", help="last stage to run"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--grid", action="append", default=[], metavar="'KEY=VALUE ...'")
    parser.add_argument("--select-steps", type=int, help="steps of the runs of stage select; default: as in the recipe")
    parser.add_argument("--model", action="append", choices=MODELS, default=[], help="both without")
    parser.add_argument("--task", dest="tasks", action="append", default=[])
    given = parser.parse_args()
    grid = tuple(given.grid or GRID)
    places = (given.recipe, given.data.resolve(), given.output.resolve())
    models = tuple(given.model or MODELS)
    bench = Bench(*places, tuple(given.changes), tuple(given.tasks), grid, models, given.select_steps)
    bench.output.mkdir(parents=True, exist_ok=True)
    runs = len(models) * (len(grid) * (len(grid) > 1) + len(given.seeds) * (given.stage != "select"))
    print(f"{runs} runs for the table, saved in {bench.output}; existing runs are reused", flush=True)
    chosen = select(bench)
    pages = [f"Chosen: {json.dumps(chosen)}; seeds {given.seeds}; mean, and range over seeds; hit@1 in percent."]
    if given.stage != "select":
        pages.append(table(bench, chosen, given.seeds))
    if given.stage in ("curve", "all"):
        pages.append(curve(bench, chosen, given.seeds[0]))
    if given.stage in ("ablate", "all") and "vlm" in chosen:
        pages.append(ablate(bench, chosen["vlm"], given.seeds))
    (bench.output / "tables.md").write_text("\n\n".join(pages) + "\n")
    print("\n\n".join(pages))


if __name__ == "__main__":
    main()
