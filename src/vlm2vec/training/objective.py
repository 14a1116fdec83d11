"""Computes the loss of a step over the pairs of all ranks.

Each rank computes the loss of its own queries against the targets of all ranks; the values of all ranks sum to the loss
of the whole batch.

Shapes: B queries of this rank, N targets of this rank, M targets of all ranks, D embedding dim, K positives of a query.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from vlm2vec.data.collate import PairBatch
from vlm2vec.errors import UserError
from vlm2vec.losses import NO_QUERY, Exclusions, Labels, Reference, contrastive_loss, matryoshka
from vlm2vec.training.gather import gather_rows, gather_with_gradient, rank, world_size
from vlm2vec.training.loss_settings import LossSettings

NO_KEY = -1
"""Key that no input has."""


@dataclass
class GatheredTargets:
    """Metadata of the targets of all ranks: first positives in query order, then the remaining targets by rank.

    Attributes:
        first_query: Index of this rank's first query.
        num_queries: Number of queries over all ranks.
        target_keys_M: Content key of each target.
        target_ids_M: Document key of each target.
        query_keys_M: Content key of the query whose first positive the target is; `NO_KEY` for all other targets.
        positive_of_M: Index over all ranks of the query whose positive the target is; `NO_QUERY` for a negative.
        given_with_M: Index of the query that the target was given with.
        scores_M: Score of the target for the query that it was given with; NaN: no score.
        guide_ME: Embeddings of the guide model, if any.
        teacher_ME: Embeddings of the teacher, if any.
    """

    first_query: int
    num_queries: int
    target_keys_M: torch.Tensor
    target_ids_M: torch.Tensor
    query_keys_M: torch.Tensor
    positive_of_M: torch.Tensor
    given_with_M: torch.Tensor
    scores_M: torch.Tensor
    guide_ME: torch.Tensor | None = None
    teacher_ME: torch.Tensor | None = None

    @classmethod
    def of(cls, pairs: PairBatch, device: torch.device) -> GatheredTargets:
        """Gathers the metadata of the targets of all ranks."""
        num_local = len(pairs.query_rows)
        query_keys_N = torch.full_like(pairs.target_keys, NO_KEY)
        query_keys_N[:num_local] = pairs.query_keys
        first_query = rank() * num_local
        given_with_N = torch.where(pairs.target_queries >= 0, pairs.target_queries + first_query, NO_QUERY)
        positive_of_N = torch.where(pairs.is_positive, given_with_N, NO_QUERY)
        others_UE = (pairs.guide, pairs.teacher)
        references_NE = (None if found_UE is None else found_UE[pairs.target_rows] for found_UE in others_UE)

        def gathered(local: torch.Tensor) -> torch.Tensor:
            return torch.cat(positives_first(gather_rows(local.to(device)), num_local))

        guide_ME, teacher_ME = (None if local is None else gathered(local) for local in references_NE)
        return cls(
            first_query,
            num_local * world_size(),
            gathered(pairs.target_keys),
            gathered(pairs.target_ids),
            gathered(query_keys_N),
            gathered(positive_of_N),
            gathered(given_with_N),
            gathered(pairs.scores),
            guide_ME,
            teacher_ME,
        )


def positives_first(parts: list[torch.Tensor], num_positives: int) -> list[torch.Tensor]:
    """Concatenates the first positives of all ranks in query order, then all other rows.

    Every rank has the same number of queries.
    """
    return [part[:num_positives] for part in parts] + [part[num_positives:] for part in parts]


class Objective(nn.Module):
    """The loss of a recipe; its own parameters, if any, are trained with the model.

    Args:
        settings: Losses, directions and masks.
        temperature: Temperature; the initial value if it is learned.
        mask_equal_targets: Whether to mask targets that equal a query's positive.
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
        if "sigmoid" in settings.losses and settings.learn_bias:
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias, persistent=False)

    @property
    def learns(self) -> bool:
        """Whether the loss has trainable parameters."""
        return any(True for _ in self.parameters())

    def forward(
        self, queries_BD: torch.Tensor, targets_ND: torch.Tensor, pairs: PairBatch, gathered: GatheredTargets
    ) -> torch.Tensor:
        """Computes this rank's share of the loss; the shares of all ranks sum to the mean over the whole batch.

        Args:
            queries_BD: Query vectors of this rank.
            targets_ND: Target vectors of this rank, first positives first.
            pairs: Pairs of this rank.
            gathered: Metadata of the targets of all ranks.
        """
        targets_MD = torch.cat(positives_first(gather_with_gradient(targets_ND), len(queries_BD)))
        both = self.settings.directions == "both"
        weights = {self.settings.kind: 0.5 if both else 1.0, **self.settings.also}
        value = self._one_way(weights, queries_BD, targets_MD, self._labels(pairs, gathered)) / world_size()
        if both:
            queries_MD = torch.cat(gather_with_gradient(queries_BD))
            share = pairs.is_positive.sum() / (gathered.positive_of_M != NO_QUERY).sum()
            weights, labels = {self.settings.kind: 0.5}, self._labels_back(pairs, gathered)
            value = value + self._one_way(weights, targets_ND[pairs.is_positive], queries_MD, labels) * share
        if self.settings.distill_vectors:
            value = value + self.settings.distill_vectors * self._distance(queries_BD, targets_ND, pairs, gathered)
        return value

    @staticmethod
    def _distance(
        queries_BD: torch.Tensor, targets_ND: torch.Tensor, pairs: PairBatch, gathered: GatheredTargets
    ) -> torch.Tensor:
        """Computes this rank's share of the mean of 1 - cosine(own vector, teacher's vector) over all ranks."""
        teacher_UD, own_D = pairs.teacher, queries_BD.shape[1]
        if teacher_UD is None or teacher_UD.shape[1] != own_D:
            found = None if teacher_UD is None else teacher_UD.shape[1]
            raise UserError(
                f"loss.distill_vectors: the teacher's vectors have {found} dimensions, the model's {own_D}; "
                "use also: {distillation: 1}, which compares similarities"
            )
        found_D = torch.cat([queries_BD, targets_ND]).float()
        wanted_D = teacher_UD[torch.cat([pairs.query_rows, pairs.target_rows])]
        return (1 - (found_D * wanted_D).sum(dim=1)).sum() / (gathered.num_queries + len(gathered.target_keys_M))

    def _one_way(
        self, losses: Mapping[str, float], rows_BD: torch.Tensor, columns_MD: torch.Tensor, labels: Labels
    ) -> torch.Tensor:
        loss = partial(
            contrastive_loss, labels=labels, losses=losses, temperature=self.log_temperature.exp(), bias=self.bias
        )
        dims = self.settings.matryoshka_dims
        return matryoshka(loss, rows_BD, columns_MD, dims) if dims else loss(rows_BD, columns_MD)

    def _labels(self, pairs: PairBatch, gathered: GatheredTargets) -> Labels:
        """Builds the labels for the queries of this rank against all targets."""
        settings = self.settings
        keys = []
        if self.mask_equal_targets:
            for of_mine_N, of_all_M in (
                (pairs.target_keys, gathered.target_keys_M),
                (pairs.target_ids, gathered.target_ids_M),
            ):
                keys.append((by_query(of_mine_N, pairs), of_all_M))
        if settings.mask_equal_queries:
            keys.append((pairs.query_keys, gathered.query_keys_M))
        guide, teacher = (
            Reference(mine_UE[pairs.query_rows], all_ME) if mine_UE is not None and all_ME is not None else None
            for mine_UE, all_ME in ((pairs.guide, gathered.guide_ME), (pairs.teacher, gathered.teacher_ME))
        )
        return Labels(
            torch.arange(len(pairs.query_rows), device=pairs.query_keys.device) + gathered.first_query,
            gathered.positive_of_M,
            gathered.given_with_M,
            Exclusions(keys, settings.mask_margin, guide, settings.guide_margin),
            settings.hardness_alpha,
            settings.hardness_mode,
            gathered.scores_M / settings.score_temperature,
            teacher,
            settings.teacher_temperature,
        )

    def _labels_back(self, pairs: PairBatch, gathered: GatheredTargets) -> Labels:
        """Builds the labels for the positives of this rank against all queries, with the same pairs masked."""
        settings, num_queries = self.settings, gathered.num_queries
        is_positive_N = pairs.is_positive
        query_of_P = pairs.target_queries[is_positive_N]
        keys = []
        if self.mask_equal_targets:
            keys.append((pairs.target_keys[is_positive_N], gathered.target_keys_M[:num_queries]))
            keys.append((pairs.target_ids[is_positive_N], gathered.target_ids_M[:num_queries]))
        if settings.mask_equal_queries:
            keys.append((pairs.query_keys[query_of_P], gathered.query_keys_M[:num_queries]))
        return Labels(
            query_of_P + gathered.first_query,
            torch.arange(num_queries, device=query_of_P.device),
            exclusions=Exclusions(keys, settings.mask_margin),
            hardness_alpha=settings.hardness_alpha,
            hardness_mode=settings.hardness_mode,
        )


def by_query(values_N: torch.Tensor, pairs: PairBatch) -> torch.Tensor:
    """Returns the values of each query's positives, shape [B, K], padded with `NO_KEY`."""
    positives_P = pairs.is_positive.nonzero()[:, 0]
    query_of_P = pairs.target_queries[positives_P]
    order = torch.argsort(query_of_P, stable=True)
    counts_B = torch.bincount(query_of_P, minlength=len(pairs.query_rows))
    start_B = counts_B.cumsum(0) - counts_B
    query_of_P = query_of_P[order]
    place_P = torch.arange(len(order), device=order.device) - start_B[query_of_P]
    found_BK = values_N.new_full((len(counts_B), int(counts_B.max())), NO_KEY)
    found_BK[query_of_P, place_P] = values_N[positives_P[order]]
    return found_BK
