"""The heads of rerankers: from the states of a prompt to one log-odds value.

Shapes: N pairs, L tokens, P length of the pooled states.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from vlm2vec.errors import UserError
from vlm2vec.models.pooling import last_places

HeadKind = Literal["linear", "product"]
START_SCALE = 20.0  # cosines then count as in a contrastive loss of temperature 0.05


class LinearHead(nn.Linear):
    """A linear layer from the pooled states of a prompt, in float32; a new one gives 0 for every pair."""

    kind: HeadKind = "linear"

    def __init__(self, pooled_dim: int) -> None:
        super().__init__(pooled_dim, 1, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, pooled_NP: torch.Tensor) -> torch.Tensor:
        """Log-odds [N, 1] in float32."""
        # Products instead of a matrix product, which autocast would compute in bfloat16.
        return (pooled_NP.float() * self.weight).sum(dim=1, keepdim=True) + self.bias


class ProductHead(LinearHead):
    """Adds the cosine between the pooled states of the query and those of the candidate, times a learned scale.

    A linear layer alone has nothing to start from if the base cannot compare query and candidate yet. Pooled as the
    embedding model pools, the states of a side are near its vector, so this head starts near its similarities: with
    last-token pooling, the state at the end of the query is the query's vector; with a mean, in a model that attends in
    both directions, each side has also read the other.
    """

    kind: HeadKind = "product"

    def __init__(self, pooled_dim: int) -> None:
        super().__init__(pooled_dim)
        self.scale = nn.Parameter(torch.tensor(START_SCALE))

    def compare(self, query_NP: torch.Tensor, candidate_NP: torch.Tensor, whole_NP: torch.Tensor) -> torch.Tensor:
        """Log-odds [N, 1] in float32.

        Args:
            query_NP: Pooled states of the query.
            candidate_NP: Pooled states of what follows it.
            whole_NP: Pooled states of both.
        """
        cosines_N1 = F.cosine_similarity(query_NP.float(), candidate_NP.float(), dim=1)[:, None]
        return self.scale * cosines_N1 + self(whole_NP)  # type: ignore[no-any-return]


HEADS: dict[HeadKind, type[LinearHead]] = {"linear": LinearHead, "product": ProductHead}
"""Heads by their name in a recipe, `rerank.head`."""


def sides_of(ids_NL: torch.Tensor, mask_NL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks [N, L] of the tokens of query and candidate. The query ends at the first token equal to the prompt's last.

    Raises:
        UserError: if a prompt has this token at its end only.
    """
    last_N = last_places(mask_NL)
    end_N1 = ids_NL.gather(1, last_N[:, None])
    first_N = ((ids_NL == end_N1) & mask_NL.bool()).int().argmax(dim=1)
    if bool((first_N == last_N).any()):
        raise UserError(
            "rerank.head: product compares the states of query and candidate; expected the prompt's last token after "
            "the query as well, such as rerank.prompt.body: '{query}[SEP]{document}' for compact"
        )
    is_query_NL = torch.arange(mask_NL.shape[1], device=mask_NL.device) <= first_N[:, None]
    return mask_NL * is_query_NL, mask_NL * ~is_query_NL
