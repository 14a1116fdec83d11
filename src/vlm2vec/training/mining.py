"""Mines hard negatives with a model: for each query, the nearest targets that are not its positives.

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

BLOCK, TARGETS_AT_ONCE = 1024, 8192  # a block of scores is 32 MiB, however many pairs and targets there are


@dataclass(frozen=True)
class MiningRule:
    """Selection of negatives among the nearest targets.

    Attributes:
        num: Maximum number of negatives per pair.
        skip: Number of nearest targets to skip: they are often unmarked positives.
        max_rank: Highest rank that is taken; None: no limit.
        margin: Minimum difference between the positive's cosine and the negative's; None: no limit.
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
    """Returns the hard negatives of each query as rows of `targets_MD`, nearest first.

    Args:
        queries_ND: Unit-norm query vectors.
        targets_MD: Unit-norm vectors of distinct targets.
        own_N: Row of each query's positive.
        positives: Rows that are not negatives of the query (the positives of every equal query).
        rule: Selection rule; ranks are counted among the targets that are not positives.
    """
    wanted = rule.skip + rule.num if rule.max_rank is None else max(rule.max_rank, rule.skip)
    found = []
    for start in range(0, len(queries_ND), BLOCK):
        part_BD = queries_ND[start : start + BLOCK].astype(np.float32, copy=False)
        rows = range(start, start + len(part_BD))
        own_BD = targets_MD[[own_N[n] for n in rows]].astype(np.float32, copy=False)
        limit_B = np.full(len(part_BD), np.inf, np.float32)
        if rule.margin is not None:
            limit_B = np.einsum("bd,bd->b", part_BD, own_BD) - np.float32(rule.margin)
        # A rank limit counts every target that is not a positive; without it, only targets below the limit compete.
        bar_B = limit_B if rule.max_rank is None else np.full_like(limit_B, np.inf)
        cosines, columns = _nearest(part_BD, targets_MD, [positives[n] for n in rows], bar_B, wanted)
        for limit, values, places in zip(limit_B.tolist(), cosines.tolist(), columns.tolist(), strict=True):
            ranked = list(zip(values, places, strict=True))[rule.skip :]
            found.append([row for cosine, row in ranked if -np.inf < cosine <= limit][: rule.num])
    return found


def _nearest(
    queries_BD: np.ndarray, targets_MD: np.ndarray, positives: Sequence[set[int]], bar_B: np.ndarray, wanted: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosines and rows of each query's `wanted` nearest targets that are not positives and not above its bar.

    The targets are scored in blocks and only the best so far are kept, so memory does not grow with M. Positions
    without a target have a cosine of -inf.
    """
    queries, bar_B1 = torch.from_numpy(queries_BD), torch.from_numpy(bar_B)[:, None]
    best = torch.full((len(queries), wanted), -torch.inf)
    best_rows = torch.zeros((len(queries), wanted), dtype=torch.long)
    pairs = np.array([(b, m) for b, mine in enumerate(positives) for m in mine], np.int64).reshape(-1, 2)
    for begin in range(0, len(targets_MD), TARGETS_AT_ONCE):
        block = torch.from_numpy(targets_MD[begin : begin + TARGETS_AT_ONCE].astype(np.float32, copy=False))
        cosines = queries @ block.T
        cosines[cosines > bar_B1] = -torch.inf
        inside = pairs[(pairs[:, 1] >= begin) & (pairs[:, 1] < begin + len(block))]
        cosines[inside[:, 0], inside[:, 1] - begin] = -torch.inf
        near = cosines.topk(min(wanted, len(block)), dim=1)
        merged = torch.cat([best, near.values], dim=1).topk(wanted, dim=1)
        best_rows = torch.cat([best_rows, near.indices + begin], dim=1).gather(1, merged.indices)
        best = merged.values
    return best, best_rows


def mine(
    model: str, root: Path, output: Path, rule: MiningRule, sets: Sequence[str] = (), batch_size: int = 32
) -> dict[str, float]:
    """Writes copies of the sets of `root` with mined negatives to `output`.

    Returns:
        The mean number of negatives per pair, by set.

    Raises:
        UserError: if `output` is `root` or already contains one of the sets, or for invalid input.
    """
    names = list(sets) or list_sets(root)
    for name in names:
        if (output / name).exists():
            raise UserError(f"{output / name}: already exists; choose another output or delete it")
    embedder = Embedder.from_pretrained(model)
    embedder.backbone.cache_images(cache_folder() / "vision")  # shared with training and evaluation
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
    first: dict[int, int] = {}  # the first pair with this target
    for i, example in enumerate(examples):
        first.setdefault(key_number(example.target), i)
    column = {key: m for m, key in enumerate(first)}
    own = [column[key_number(example.target)] for example in examples]
    of_query: dict[int, set[int]] = {}
    keys = [key_number(example.query) for example in examples]
    for key, m in zip(keys, own, strict=True):
        itself = {column[key]} if key in column else set()  # a target that equals the query is not a negative either
        of_query.setdefault(key, itself).add(m)
    with progress_bar(f"encoding {name}", len(examples) + len(column)) as advance:

        def encode(items: list[EmbeddingInput]) -> np.ndarray:
            return embedder.encode(items, batch_size=batch_size, progress=advance)

        queries_ND = encode([example.query for example in examples])
        targets_MD = encode([examples[i].target for i in first.values()])
    rows = mine_negatives(queries_ND, targets_MD, own, [of_query[key] for key in keys], rule)
    pair_of = list(first.values())
    return [[pair_of[m] for m in chosen] for chosen in rows]
