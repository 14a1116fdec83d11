"""The heads of rerankers: from the states of a prompt to one log-odds value.

Shapes: N pairs, L tokens, D hidden size.
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
    """A linear layer from the state of the last token, in float32; a new one gives 0 for every pair."""

    kind: HeadKind = "linear"

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, last_ND: torch.Tensor) -> torch.Tensor:
        """Log-odds [N, 1] in float32."""
        # Products instead of a matrix product, which autocast would compute in bfloat16.
        return (last_ND.float() * self.weight).sum(dim=1, keepdim=True) + self.bias


class ProductHead(LinearHead):
    """Adds the cosine between the state at the end of the query and the state of the last token, times a learned scale.

    A linear layer alone has nothing to start from if the base cannot compare query and candidate yet. The state of an
    embedding model at the end of the query is the query's vector, so this head starts near its similarities.
    """

    kind: HeadKind = "product"

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.scale = nn.Parameter(torch.tensor(START_SCALE))

    def compare(self, query_ND: torch.Tensor, last_ND: torch.Tensor) -> torch.Tensor:
        """Log-odds [N, 1] in float32.

        Args:
            query_ND: States at the end of the query.
            last_ND: States of the last token.
        """
        cosines_N1 = F.cosine_similarity(query_ND.float(), last_ND.float(), dim=1)[:, None]
        return self.scale * cosines_N1 + self(last_ND)  # type: ignore[no-any-return]


HEADS: dict[HeadKind, type[LinearHead]] = {"linear": LinearHead, "product": ProductHead}
"""Heads by their name in a recipe, `rerank.head`."""


def query_ends(ids_NL: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
    """Position of the end of each query, [N]: the first token equal to the last one of its prompt.

    Raises:
        UserError: if a prompt has this token at its end only.
    """
    last_N = last_places(mask_NL)
    end_N1 = ids_NL.gather(1, last_N[:, None])
    first_N = ((ids_NL == end_N1) & mask_NL.bool()).int().argmax(dim=1)
    if bool((first_N == last_N).any()):
        raise UserError(
            "rerank.head: product compares the states at the end of query and prompt; expected the prompt's last token "
            "after the query as well, such as rerank.prompt.body: '{query}<|im_end|>{document}'"
        )
    return first_N
