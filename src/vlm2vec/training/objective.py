"""The loss of a step over the pairs of all processes: which vectors meet, which are left out, what is learned.

Each process answers for its own queries against the targets of all; the parts sum to the loss of the whole batch.

Shapes: B queries of this process, M targets of all, D embedding dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from vlm2vec.data.collate import PairBatch
from vlm2vec.losses import Exclusions, info_nce, matryoshka, sigmoid_loss
from vlm2vec.training.config import LossSettings
from vlm2vec.training.gather import gather_rows, gather_with_gradient, num_processes

NOBODY = -1  # a key that no input has


@dataclass
class Columns:
    """What all processes bring: one entry a target (the positives in query order, then the negatives).

    Attributes:
        target_keys: Content of each target, shape [M].
        target_ids: Document of each target, shape [M].
        query_keys: Content of the query whose positive it is; none for a negative, shape [M].
        first: Column of this process's first positive.
        num_queries: Of all processes.
    """

    target_keys: torch.Tensor
    target_ids: torch.Tensor
    query_keys: torch.Tensor
    first: int
    num_queries: int

    @classmethod
    def of(cls, pairs: PairBatch, device: torch.device) -> Columns:
        """Gathers the keys of every process."""
        num_local = len(pairs.query_rows)
        owner = torch.full_like(pairs.target_keys, NOBODY)
        owner[:num_local] = pairs.query_keys
        found = [
            torch.cat(positives_first(gather_rows(keys.to(device)), num_local))
            for keys in (pairs.target_keys, pairs.target_ids, owner)
        ]
        rank = torch.distributed.get_rank() if num_processes() > 1 else 0
        return cls(found[0], found[1], found[2], rank * num_local, num_local * num_processes())


def positives_first(parts: list[torch.Tensor], num_positives: int) -> list[torch.Tensor]:
    """All processes' positives in query order, then all negatives; each process brings equally many positives."""
    return [part[:num_positives] for part in parts] + [part[num_positives:] for part in parts]


class Objective(nn.Module):
    """The recipe's loss; its own parameters, if any, are learned with the model.

    Args:
        settings: Kind, directions, masks.
        temperature: Fixed, or where the learned one starts.
        mask_equal_targets: Whether targets equal to a query's positive are left out.
    """

    log_temperature: torch.Tensor
    bias: torch.Tensor

    def __init__(self, settings: LossSettings, temperature: float, mask_equal_targets: bool = True) -> None:
        super().__init__()
        self.settings = settings
        self.mask_equal_targets = mask_equal_targets
        log_temperature = torch.tensor(math.log(temperature))
        bias = torch.tensor(settings.bias)
        if settings.learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature, persistent=False)
        if settings.kind == "sigmoid" and settings.learn_bias:
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias, persistent=False)

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn."""
        return any(True for _ in self.parameters())

    def forward(
        self, queries_BD: torch.Tensor, targets_ND: torch.Tensor, pairs: PairBatch, columns: Columns
    ) -> torch.Tensor:
        """Part of the loss that this process answers for; the parts of all sum to the mean over the whole batch.

        Args:
            queries_BD: This process's query vectors.
            targets_ND: This process's target vectors, positives first.
            pairs: This process's pairs.
            columns: The keys of all processes' targets.
        """
        targets_MD = torch.cat(positives_first(gather_with_gradient(targets_ND), len(queries_BD)))
        index_B = torch.arange(len(queries_BD), device=queries_BD.device) + columns.first
        rule = self._exclusions(pairs, columns, index_B, slice(None))
        value = self._cut(partial(self._one_way, index_B=index_B, rule=rule), queries_BD, targets_MD)
        if self.settings.directions == "both":
            queries_MD = torch.cat(gather_with_gradient(queries_BD))
            rule = self._exclusions(pairs, columns, index_B, slice(columns.num_queries))
            back = partial(self._one_way, index_B=index_B, rule=rule)
            value = (value + self._cut(back, targets_ND[: len(queries_BD)], queries_MD)) / 2
        return value / num_processes()

    def _one_way(
        self, rows_BD: torch.Tensor, columns_MD: torch.Tensor, index_B: torch.Tensor, rule: Exclusions
    ) -> torch.Tensor:
        temperature = self.log_temperature.exp()
        if self.settings.kind == "sigmoid":
            return sigmoid_loss(rows_BD, columns_MD, index_B, temperature, self.bias, rule)
        return info_nce(rows_BD, columns_MD, index_B, temperature, rule)

    def _cut(self, loss: partial[torch.Tensor], rows_BD: torch.Tensor, columns_MD: torch.Tensor) -> torch.Tensor:
        dims = self.settings.matryoshka_dims
        return matryoshka(loss, rows_BD, columns_MD, dims) if dims else loss(rows_BD, columns_MD)

    def _exclusions(self, pairs: PairBatch, columns: Columns, index_B: torch.Tensor, which: slice) -> Exclusions:
        """Both ways the same pairs meet: column j is left out for row i where j's target or query is that of i."""
        settings = self.settings
        keys = []
        if self.mask_equal_targets:
            keys.append((columns.target_keys[index_B], columns.target_keys[which]))
            keys.append((columns.target_ids[index_B], columns.target_ids[which]))
        if settings.mask_equal_queries:
            keys.append((columns.query_keys[index_B], columns.query_keys[which]))
        return Exclusions(keys, settings.mask_margin)
