"""Hard negatives by a model: for each query the targets that it takes for near and that are not its own.

Shapes: N pairs, M distinct targets, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vlm2vec.cache import cache_folder
from vlm2vec.data.collate import key_number
from vlm2vec.data.examples import TrainExample
from vlm2vec.data.mmeb.images import list_sets, read_train_set, write_negatives
from vlm2vec.errors import UserError
from vlm2vec.models.embedder import Embedder
from vlm2vec.progress import progress_bar
from vlm2vec.types import EmbeddingInput

BLOCK = 1024  # queries scored at once


@dataclass(frozen=True)
class MiningRule:
    """Which near targets are taken.

    Attributes:
        num: Negatives a pair at most.
        skip: The nearest so many are passed over: they are often unmarked positives.
        max_rank: Not beyond this rank; None: any.
        margin: A negative's cosine must lie at least this far below the positive's; None: anywhere.
    """

    num: int = 1
    skip: int = 0
    max_rank: int | None = 100
    margin: float | None = 0.0


def mine_negatives(
    queries_ND: np.ndarray,
    targets_MD: np.ndarray,
    own_N: Sequence[int],
    positives: Sequence[set[int]],
    rule: MiningRule,
) -> list[list[int]]:
    """For each query, rows of `targets_MD` that are its hard negatives, the nearest first.

    Args:
        queries_ND: Unit-norm query vectors.
        targets_MD: Unit-norm vectors of distinct targets.
        own_N: Row of each query's positive.
        positives: All rows that are no negatives of that query (the positives of every equal query).
        rule: Ranks are counted among what is not a positive.
    """
    wanted = rule.skip + rule.num if rule.max_rank is None else max(rule.max_rank, rule.skip)
    found = []
    for start in range(0, len(queries_ND), BLOCK):
        part = torch.from_numpy(queries_ND[start : start + BLOCK]).float()
        cosines_bM = part @ torch.from_numpy(targets_MD).float().T
        rows = range(start, start + len(part))
        limits = [float(cosines_bM[b, own_N[n]]) - (rule.margin or 0.0) for b, n in enumerate(rows)]
        for b, n in enumerate(rows):
            cosines_bM[b, list(positives[n])] = -torch.inf
        if rule.margin is not None and rule.max_rank is None:
            cosines_bM.masked_fill_(cosines_bM > torch.tensor(limits)[:, None], -torch.inf)
        near = cosines_bM.topk(min(wanted, cosines_bM.shape[1]), dim=1)
        for b in range(len(part)):
            limit = limits[b] if rule.margin is not None else torch.inf
            ranked = list(zip(near.values[b].tolist(), near.indices[b].tolist(), strict=True))[rule.skip :]
            found.append([row for cosine, row in ranked if -torch.inf < cosine <= limit][: rule.num])
    return found


def mine(
    model: str, root: Path, output: Path, rule: MiningRule, sets: Sequence[str] = (), batch_size: int = 32
) -> dict[str, float]:
    """Writes the sets of `root` again in `output` with mined negatives.

    Returns:
        Negatives a pair, by set.

    Raises:
        UserError: if `output` is `root` or already holds one of the sets, or for bad input.
    """
    names = list(sets) or list_sets(root)
    for name in names:
        if (output / name).exists():
            raise UserError(f"{output / name}: is there already; choose another output or delete it")
    embedder = Embedder.from_pretrained(model)
    embedder.backbone.cache_images(cache_folder() / "vision")  # where training and evaluation keep their features
    means = {}
    for name in names:
        examples = read_train_set(root, name, use_negatives=False)
        negatives = _of_set(embedder, examples, rule, name, batch_size)
        if embedder.backbone.vision_cache is not None:
            embedder.backbone.vision_cache.flush()
        write_negatives(root, name, negatives, output)
        means[name] = sum(map(len, negatives)) / len(negatives)
    return means


def _of_set(
    embedder: Embedder, examples: Sequence[TrainExample], rule: MiningRule, name: str, batch_size: int
) -> list[list[int]]:
    first: dict[int, int] = {}  # the first pair that has this target
    for i, example in enumerate(examples):
        first.setdefault(key_number(example.target), i)
    column = {key: m for m, key in enumerate(first)}
    own = [column[key_number(example.target)] for example in examples]
    of_query: dict[int, set[int]] = {}
    keys = [key_number(example.query) for example in examples]
    for key, m in zip(keys, own, strict=True):
        itself = {column[key]} if key in column else set()  # a target that equals the query is no negative either
        of_query.setdefault(key, itself).add(m)
    with progress_bar(f"encoding {name}", len(examples) + len(column)) as advance:

        def encode(items: list[EmbeddingInput]) -> np.ndarray:
            return embedder.encode(items, batch_size=batch_size, progress=advance)

        queries_ND = encode([example.query for example in examples])
        targets_MD = encode([examples[i].target for i in first.values()])
    rows = mine_negatives(queries_ND, targets_MD, own, [of_query[key] for key in keys], rule)
    pair_of = list(first.values())
    return [[pair_of[m] for m in chosen] for chosen in rows]
