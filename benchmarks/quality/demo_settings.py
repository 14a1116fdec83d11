"""Chooses the settings of both demo models by a grid search on names held out of the demo's training sets.

    python benchmarks/quality/demo_settings.py --data DEMO --output runs/demo-settings --grid "train.learning_rate=1e-3"

DEMO is the folder that `vlm2vec data demo` prints. All drawings of held-out names, and all images composed with them,
are removed from the training sets; rows that ask for these names become evaluation queries. No evaluation set is read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from held_out import Rows, question, write_held_out
from photos import MODELS, Bench

HELD_OUT = 12  # hold out one name in 12
TONES = {f"1f3f{last}" for last in "bcdef"}
SETS = {"EmojiName": "classification", "EmojiT2I": "retrieval", "EmojiEdit": "retrieval"}
SETS |= {"EmojiVQA": "vqa", "EmojiSheet": "grounding"}


def concept(drawing: str) -> str:
    """Returns a drawing's code without vendor and skin tone."""
    return "-".join(part for part in drawing.split("-")[1:] if part not in TONES)


def is_held(code: str) -> bool:
    return int.from_bytes(hashlib.blake2b(code.encode(), digest_size=4).digest()) % HELD_OUT == 0


class Names:
    """Determines the concepts that a row shows and asks for."""

    def __init__(self, data: Path, rows: Rows) -> None:
        self.drawings: dict[str, list[str]] = json.loads((data / "pictures.json").read_text())
        self.codes = {row["pos_text"]: self.shown(row["qry_image_path"])[0] for row in rows}

    def shown(self, path: str) -> list[str]:
        return [concept(drawing) for drawing in self.drawings[path.removeprefix("images/")]] if path else []

    def asked(self, row: dict[str, Any]) -> str:
        """Returns the concept of the correct answer, given as an image or a name."""
        return (self.shown(row["pos_image_path"]) or [self.codes[row["pos_text"]]])[0]

    def seen(self, row: dict[str, Any]) -> set[str]:
        """Returns every concept in the row."""
        wrong = {self.codes[row["neg_text"]]} if row["neg_text"] else set()
        return {*self.shown(row["qry_image_path"]), self.asked(row)} | wrong


def hold_out(data: Path, output: Path) -> tuple[Path, Path]:
    """Writes the training sets without the held-out names, and a benchmark of the rows that ask for these names."""
    source = data / "train"
    (names_file,) = (source / "EmojiName").glob("original-*.parquet")
    names = Names(data, pq.read_table(names_file).to_pylist())

    def kept(_: str, rows: Rows) -> Rows:
        return [row for row in rows if not any(map(is_held, names.seen(row)))]

    def questions(_: str, rows: Rows) -> Rows:
        held = [row for row in rows if is_held(names.asked(row))]
        targets = dict.fromkeys((row["pos_text"], row["pos_image_path"]) for row in held)
        return [question(row, targets) for row in held]

    return write_held_out(source, output, kept, questions, SETS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/demo-settings"))
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--grid", action="append", required=True, metavar="'KEY=VALUE ...'")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--model", choices=MODELS, action="append", default=[])
    given = parser.parse_args()
    output = given.output.resolve()
    bench = Bench(given.recipe, given.data.resolve(), output, tuple(given.changes), (), tuple(given.grid))
    root, held = hold_out(bench.data, output / "held-out")
    print(f"| model | settings | overall | {' | '.join(SETS)} |\n| --- | --- {'| --: ' * (len(SETS) + 1)}|")
    for model in given.model or MODELS:
        for settings in bench.grid:
            place = f"{model}/{settings.replace(' ', ',')}"
            scores = bench.run(place, bench.changes_of(model, settings), root, held)
            cells = [f"{100 * scores[name]:.1f}" for name in ("overall", *SETS)]
            print(f"| {model} | {settings} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
