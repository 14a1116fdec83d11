"""How well a model orders sentence pairs: Spearman's correlation of cosine and given similarity, on 200 pairs.

    python benchmarks/quality/sentence_order.py compact runs/mine

`sentence_pairs.tsv` has 40 rows, written for this project: a sentence, the same in other words, one that differs in
what is done or to what, and one of the same topic only. Their similarities are 3, 2 and 1; two pairs a row of sentences
of other rows have 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from vlm2vec import Embedder

PAIRS = Path(__file__).with_name("sentence_pairs.tsv")


def pairs() -> list[tuple[str, str, int]]:
    """The 200 pairs with their similarity."""
    rows = [line.split("\t") for line in PAIRS.read_text().splitlines()]
    graded = [(row[0], row[column], 4 - column) for row in rows for column in (1, 2, 3)]
    apart = [(row[0], rows[(i + step) % len(rows)][0], 0) for i, row in enumerate(rows) for step in (7, 13)]
    return graded + apart


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    shared: np.ndarray = (first + (counts - 1) / 2)[inverse]
    return shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    for model in parser.parse_args().models:
        left, right, similarity = zip(*pairs(), strict=True)
        embedder = Embedder.from_pretrained(model)
        cosines = (embedder.encode(list(left)) * embedder.encode(list(right))).sum(axis=1)
        print(f"{model}: {np.corrcoef(ranks(cosines), ranks(np.array(similarity)))[0, 1]:.3f}")


if __name__ == "__main__":
    main()
