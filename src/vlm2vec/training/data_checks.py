"""Checks that the data contain what the loss needs: negatives, and scores if the loss uses them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch

from vlm2vec.data.collate import key_number
from vlm2vec.data.examples import TrainExample
from vlm2vec.errors import UserError
from vlm2vec.training.config import Recipe
from vlm2vec.training.gather import rank
from vlm2vec.training.objective import GatheredTargets

logger = logging.getLogger(__name__)


def check_negatives(recipe: Recipe, sets: Mapping[str, Sequence[TrainExample]]) -> None:
    """Checks that at least one query has a negative in some batch.

    Reads examples until two are negatives of each other, usually the first two.

    Args:
        recipe: Its batching determines whether sets share a batch, its masks which targets are negatives.
        sets: Examples by set name.

    Raises:
        UserError: if no query has a negative; the message names the sets and what all their pairs share.
    """
    data = recipe.data
    whole_batches = data.batching == "interleaved" and data.sub_batch_size >= recipe.train.batch_size
    alone = data.batching == "single" or whole_batches
    for names in [[name] for name in sets] if alone else [list(sets)]:
        cause = _without_negatives(chain.from_iterable(sets[name] for name in names), recipe.loss.mask_equal_queries)
        if cause:
            raise UserError(
                f"{', '.join(names)}: no query has a negative, because {cause}: the loss would be 0 in every step; add "
                "pairs that differ, add negatives, or train together with other sets (data.batching: mixed)"
            )


def check_scores(recipe: Recipe, sets: Mapping[str, Sequence[TrainExample]]) -> None:
    """Checks that the data contain scores if the loss uses them.

    Raises:
        UserError: if no record has a score; the message names the sets.
    """
    wanted = "soft_labels" in recipe.loss.losses
    if wanted and not any(example.scores for examples in sets.values() for example in examples):
        raise UserError(
            f"{', '.join(sets)}: loss soft_labels requires scores, but no record has any; add target_scores and "
            "negative_scores to the records, or remove soft_labels from loss.also"
        )


def _without_negatives(examples: Iterable[TrainExample], mask_equal_queries: bool) -> str | None:
    """Returns the reason why no example has a negative; None if an example has one.

    Two pairs are negatives of each other if both their queries and their targets differ. Such pairs exist unless all
    queries or all targets are equal.
    """
    queries: set[int] = set()
    targets: set[int] = set()
    ids: set[str] = set()
    for number, example in enumerate(examples, start=1):
        own = {key_number(target) for target in example.targets}
        if any(key_number(negative) not in own for negative in example.negatives):
            return None
        queries.add(key_number(example.query))
        targets |= own
        ids.add(f"id {example.target_id}" if example.target_id else f"key {min(own)}")
        if (len(queries) > 1 or (number > 1 and not mask_equal_queries)) and len(targets) > 1 and len(ids) > 1:
            return None
    if len(queries) == 1 and len(targets) == 1:
        return "there is only one distinct pair"
    return "all queries are equal" if len(queries) == 1 else "all targets are equal"


class NegativeWatch:
    """Warns about batches in which no query has a negative, once per cause."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def check(self, step: int, loss: float, gathered: GatheredTargets, origins: Sequence[str]) -> None:
        """Logs a warning if the batch has no negative.

        Args:
            step: Number of the step, from 1.
            loss: Loss of the whole batch.
            gathered: Targets of all ranks.
            origins: File and row of this rank's pairs.
        """
        cause = batch_without_negatives(gathered, loss)
        if cause and cause not in self._warned and rank() == 0:
            self._warned.add(cause)
            logger.warning(
                "step %d: no query of the batch has a negative because %s; the batch has no gradient (%s, %d pairs). "
                "Further batches with this cause are not reported.",
                step,
                cause,
                origins[0],
                gathered.num_queries,
            )


def batch_without_negatives(gathered: GatheredTargets, loss: float) -> str | None:
    """Returns the reason why no query of the batch has a negative; None if a query has one.

    Args:
        gathered: Targets of all ranks.
        loss: Loss of the whole batch; exactly 0 if masks leave no negative.
    """
    if _all_equal(gathered.target_keys_M) or _all_equal(gathered.target_ids_M):
        return "all targets are equal"
    positives = gathered.query_keys_M[: gathered.num_queries]
    if loss == 0.0:
        equal = _all_equal(positives) and gathered.num_queries > 1
        return "all queries are equal" if equal else "every other target is masked"
    return None


def _all_equal(values: torch.Tensor) -> bool:
    return bool((values == values[0]).all())
