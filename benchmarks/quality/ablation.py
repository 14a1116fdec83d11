"""What each training ingredient adds to the plain recipe, alone and together: the ablation of docs/explain/results.md.

    python benchmarks/quality/ablation.py --data photos-mmeb --output runs/ablation [--seeds 0 1 2]

1. select    the strength of hardness weighting, seed 0, on a tenth of the training queries that is held out; no
             evaluation set is read.
2. table     each ingredient alone, then all of them, on all training pairs, every seed.

Every run is kept, so an interrupted command continues where it stopped. `ablation.md` is written again after each run.
`--set key=value` changes every run's recipe, `--task` keeps some of the evaluation sets, and `--pairs` and `--queries`
make every set smaller. For the prepared demo benchmark add `--recipe recipes/demo.yaml`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from held_out import Rows, rewrite
from photos import Bench, Scores, hold_out, shown

from vlm2vec.files import write_text
from vlm2vec.training.judging import EmbedderJudge
from vlm2vec.training.mining import mine
from vlm2vec.training.nearest import MiningRule

ALPHAS = (1, 3, 9)  # LLaVE trains with 9
JUDGE = "compact"
INSTRUCTION = "Represent the text for retrieval: "
SOFT = ("loss.also={soft_labels: 0.5}", "loss.score_temperature=0.1")
JUDGED = MiningRule(num=1, margin=None, judged=20)


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: What the row is called.
        changes: Changes of the recipe.
        judged: Whether the training sets have hard negatives that the plain model finds and a judge keeps.
        instructions: Whether text targets begin with an instruction, in training and in evaluation.
    """

    name: str
    changes: tuple[str, ...] = ()
    judged: bool = False
    instructions: bool = False


def variants(alpha: str) -> list[Variant]:
    """The rows, the plain recipe first."""
    hardness = (f"loss.hardness_alpha={alpha}",)
    return [
        Variant("plain"),
        Variant(f"hardness weighting, alpha {alpha}", hardness),
        Variant("instructions on text targets", instructions=True),
        Variant("judged negatives", judged=True),
        Variant("judged negatives and soft labels", SOFT, True),
        Variant("all: hardness, instructions, judged negatives, soft labels", (*hardness, *SOFT), True, True),
    ]


def select(bench: Bench) -> str:
    """The alpha with the highest mean on the held-out tenth."""
    root, held = hold_out(bench)
    found = {}
    for alpha in ALPHAS:
        changes = [f"loss.hardness_alpha={alpha}", "train.seed=0"]
        found[str(alpha)] = bench.run(f"select/{alpha}", changes, root, held)["overall"]
    return max(found, key=lambda alpha: found[alpha])


def smaller(bench: Bench, pairs: int, queries: int) -> Bench:
    """A random part of the data: of each set, this many pairs and queries, and the answers to these queries."""
    output = bench.output / f"{pairs}-pairs-{queries}-queries"

    def some(name: str, rows: Rows, most: int) -> Rows:
        return random.Random(name).sample(rows, min(most, len(rows)))

    def asked(name: str, rows: Rows) -> Rows:
        kept = some(name, rows, queries)
        answers = {(row["tgt_text"][0], row["tgt_img_path"][0]) for row in kept}
        return [{**row, **_only(row, answers)} for row in kept]

    if not (output / "benchmark.yaml").is_file():
        images = ("images", "images_zip")
        rewrite(
            bench.data / "train",
            output / "train",
            "original-*.parquet",
            lambda name, rows: some(name, rows, pairs),
            images,
        )
        rewrite(bench.data / "eval", output / "eval", "test-*.parquet", asked, ("images", "images.zip"))
        settings = yaml.safe_load((bench.data / "benchmark.yaml").read_text())
        for task in settings["tasks"]:  # the numbers of the whole sets
            task.pop("num_queries", None)
            task.pop("num_candidates", None)
        write_text(output / "benchmark.yaml", yaml.safe_dump(settings, sort_keys=False))
    return replace(bench, data=output)


def _only(row: Mapping[str, Sequence[str]], answers: Container[tuple[str, str]]) -> dict[str, list[str]]:
    kept = [pair for pair in zip(row["tgt_text"], row["tgt_img_path"], strict=True) if pair in answers]
    return {"tgt_text": [text for text, _ in kept], "tgt_img_path": [path for _, path in kept]}


def with_instructions(bench: Bench) -> Bench:
    """The same data with an instruction before each text target."""
    output = bench.output / "instructions"

    def pairs(name: str, rows: Rows) -> Rows:
        return [row if row["pos_image_path"] else {**row, "pos_text": INSTRUCTION + row["pos_text"]} for row in rows]

    def queries(name: str, rows: Rows) -> Rows:
        return [{**row, "tgt_text": _instructed(row["tgt_text"], row["tgt_img_path"])} for row in rows]

    if not (output / "benchmark.yaml").is_file():
        rewrite(bench.data / "train", output / "train", "original-*.parquet", pairs, ("images", "images_zip"))
        rewrite(bench.data / "eval", output / "eval", "test-*.parquet", queries, ("images", "images.zip"))
        write_text(output / "benchmark.yaml", (bench.data / "benchmark.yaml").read_text())
    return replace(bench, data=output)


def _instructed(texts: Sequence[str], paths: Sequence[str]) -> list[str]:
    return [text if path else INSTRUCTION + text for text, path in zip(texts, paths, strict=True)]


def with_negatives(bench: Bench, finder: Path) -> Path:
    """Training sets with the hard negatives that the plain model of the first seed finds and the judge keeps."""
    root = bench.output / f"{bench.data.name}-judged"
    beside = root.with_name(f"{root.name}.writing")
    if not root.exists():
        shutil.rmtree(beside, ignore_errors=True)
        mine(str(finder), bench.data / "train", beside, JUDGED, judge=EmbedderJudge(JUDGE))
        beside.rename(root)
    return root


def page(found: Mapping[str, Mapping[int, Scores]], note: str) -> str:
    """The table: means and ranges over seeds, and the difference from the plain run of the same seed."""
    lines = ["| ingredient | seeds | overall | ind | ood | against plain, by seed |", f"| --- {'| --: ' * 5}|"]
    plain = found["plain"]
    for name, runs in found.items():
        cells = [shown([run[group] for run in runs.values() if group in run]) for group in ("overall", "ind", "ood")]
        steps = [100 * (runs[seed]["overall"] - plain[seed]["overall"]) for seed in runs if seed in plain]
        spread = f" ({min(steps):+.1f} to {max(steps):+.1f})" if len(steps) > 1 else ""
        more = f"{statistics.mean(steps):+.1f}{spread}" if name != "plain" else ""
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {more} |")
    return f"{note}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with benchmark.yaml, train and eval")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--recipe", type=Path, default=Path("recipes/photos.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--task", dest="tasks", action="append", default=[])
    parser.add_argument("--alpha", help="strength of hardness weighting; default: the first stage chooses it")
    parser.add_argument("--pairs", type=int, help="pairs of each training set, drawn at random; default: all")
    parser.add_argument("--queries", type=int, help="queries of each evaluation set, likewise")
    given = parser.parse_args()
    places = (given.recipe, given.data.resolve(), given.output.resolve())
    bench = Bench(*places, tuple(given.changes), tuple(given.tasks), ())
    bench.output.mkdir(parents=True, exist_ok=True)
    if given.pairs or given.queries:
        bench = smaller(bench, given.pairs or sys.maxsize, given.queries or sys.maxsize)
    alpha = given.alpha or select(bench)
    chosen = "as given" if given.alpha else "by the held-out tenth"
    note = f"alpha {alpha} {chosen}; {' '.join(given.changes)}; hit@1 in percent: mean (range over seeds)."
    found: dict[str, dict[int, Scores]] = {}
    for seed in given.seeds:
        for variant in variants(alpha):
            here = with_instructions(bench) if variant.instructions else bench
            finder = bench.output / f"table/plain/{given.seeds[0]}/run"
            root = with_negatives(here, finder) if variant.judged else None
            place = f"table/{variant.name.replace(' ', '-').replace(',', '').replace(':', '')}/{seed}"
            scores = here.run(place, [*variant.changes, f"train.seed={seed}"], root)
            found.setdefault(variant.name, {})[seed] = scores
            write_text(bench.output / "ablation.md", page(found, note))
    print((bench.output / "ablation.md").read_text())


if __name__ == "__main__":
    main()
