"""The score by which a reranker orders candidates: its log-odds alone, or with the embedder's cosine added.

Evaluation, search, the web page and the server all score by these functions. Shapes: N candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm2vec.errors import UserError


def with_cosine(log_odds_N: Any, cosines_N: Any, weight: float) -> np.ndarray:
    """Adds the weighted cosine of query and candidate to the reranker's log-odds; float32, shape [N].

    The temperature of the embedder's training says what a cosine is worth: 1 / temperature times the cosine is the
    logit of its contrastive loss, so this weight counts both models as logits.

    Args:
        log_odds_N: Scores of the reranker; NaN for candidates that it could not read, which stay NaN.
        cosines_N: Cosines of the embedder's vectors. Not used with weight 0.
        weight: Factor of the cosine. 0: the reranker's log-odds unchanged.
    """
    log_odds = np.asarray(log_odds_N, dtype=np.float32)
    return log_odds + np.float32(weight) * np.asarray(cosines_N, dtype=np.float32) if weight else log_odds


def probability(log_odds_N: Any) -> np.ndarray:
    """Probabilities of the positive answer, 0 to 1, from their log-odds; float32."""
    log_odds = np.asarray(log_odds_N, dtype=np.float32)
    with np.errstate(over="ignore"):  # of very negative log-odds, whose probability is then 0
        return np.asarray(1 / (1 + np.exp(-log_odds)), dtype=np.float32)


def check_weight(weight: float, name: str = "cosine_weight") -> float:
    """Returns a weight for `with_cosine`; `name` is the user's word for it.

    Raises:
        UserError: for a negative weight, NaN and infinity.
    """
    if not (math.isfinite(weight) and weight >= 0):
        raise UserError(f"{name} {weight:g}: expected 0 or a positive number, such as 20")
    return weight


def check_cosines(cosines: Sequence[float] | np.ndarray | None, num_candidates: int) -> np.ndarray:
    """Returns one cosine for each candidate, float32 [N].

    Raises:
        UserError: if there are none, or another number of them.
    """
    if cosines is None:
        raise UserError("cosine_weight needs cosines: give the embedder's cosine of the query with each candidate")
    found = np.asarray(cosines, dtype=np.float32)
    if found.shape != (num_candidates,):
        raise UserError(f"cosines of shape {list(found.shape)}: expected one for each of {num_candidates} candidates")
    return found
