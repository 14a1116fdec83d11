"""All pairs of vectors above a cosine, without comparing all pairs in full.

Vectors are rotated so that their first K dimensions hold most of their length (principal axes). With x = (x1, x2), the
cosine of two unit vectors is at most x1·y1 + |x2| |y2|, which is one product of K + 1 numbers. Only pairs whose bound
reaches the threshold are compared in full, so the result is that of all pairs. K is chosen on a sample, by the cost of
both steps; where a bound excludes too little (a low threshold, few dimensions), all pairs are compared in full.

Shapes: U vectors, D embedding dim, K dimensions of the bound, B rows of a block, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

BLOCK = 2048
SAMPLE = 4096  # vectors by which K is chosen: one half gives the axes, the other shows how many pairs pass
FIRST_WIDTH = 16  # the smallest K; each next one is half as large again
PAIR_COST = 100  # one pair taken by its rows takes as long as this number of pairs in a product of blocks
SLACK = 1e-4  # rounding of the bounds, which are sums of float32
Pairs = tuple[torch.Tensor, torch.Tensor]


def near_pairs(
    vectors_UD: np.ndarray, threshold: float, wanted: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields the pairs with a cosine of at least `threshold`, each once, block by block.

    Args:
        vectors_UD: Vectors of unit norm, float32.
        threshold: Cosine of a near pair.
        wanted: For rows `left` and `right` [P], which pairs still matter, bool [P]; the others are not compared.

    Yields:
        (first row of the block, left, right): all rows before it are done; the rows of each pair [P], left < right.
    """
    vectors = torch.from_numpy(vectors_UD)
    bounds = _bounds(vectors, threshold)
    bar = threshold if bounds is vectors else threshold - SLACK
    for start in range(0, len(vectors), BLOCK):
        for other in range(start, len(vectors), BLOCK):
            left, right = _above(bounds, start, other, bar)
            matter = torch.from_numpy(wanted(left.numpy(), right.numpy()))
            left, right = left[matter], right[matter]
            if bounds is not vectors:
                near = _confirmed(vectors, start, other, (left, right), threshold)
                left, right = left[near], right[near]
            yield start, left.numpy(), right.numpy()


def _above(bounds: torch.Tensor, start: int, other: int, bar: float) -> Pairs:
    """The pairs of two blocks whose product is at least `bar`, left < right."""
    scores = bounds[start : start + BLOCK] @ bounds[other : other + BLOCK].T
    rows = (scores.amax(dim=1) >= bar).nonzero().flatten()  # few as a rule, so the block is read once
    near = (scores[rows] >= bar).nonzero()
    left, right = rows[near[:, 0]] + start, near[:, 1] + other
    upper = left < right
    return left[upper], right[upper]


def _confirmed(vectors: torch.Tensor, start: int, other: int, pairs: Pairs, threshold: float) -> torch.Tensor:
    """Which pairs of two blocks have a cosine of at least the threshold, bool [P]."""
    left, right = pairs
    block, across = vectors[start : start + BLOCK], vectors[other : other + BLOCK]
    if len(left) * PAIR_COST > len(block) * len(across):
        cosines = (block @ across.T)[left - start, right - other]
    else:
        cosines = torch.linalg.vecdot(vectors[left], vectors[right])
    return cosines.ge(threshold)


def _bounds(vectors: torch.Tensor, threshold: float) -> torch.Tensor:
    """Vectors [U, K + 1] whose products are upper bounds of the cosines; the vectors themselves if those cost less."""
    num, dim = vectors.shape
    if num <= BLOCK or dim <= FIRST_WIDTH:
        return vectors
    sample = vectors[torch.linspace(0, num - 1, min(num, SAMPLE)).long()]
    fitted, sample = sample[::2].double(), sample[1::2]
    axes_DD = torch.linalg.eigh(fitted.T @ fitted).eigenvectors.flip(1).float()
    best, least, width = dim, float(dim), FIRST_WIDTH
    while width < dim:
        bounds = _bounded(sample, axes_DD[:, :width])
        passing = ((bounds @ bounds.T >= threshold - SLACK).sum().item() - len(sample)) / len(sample) ** 2
        cost = width + min(passing * PAIR_COST, 1) * dim
        best, least = (width, cost) if cost < least else (best, least)
        width += width // 2
    if best == dim:
        return vectors
    starts = range(0, num, BLOCK)
    return torch.cat([_bounded(vectors[start : start + BLOCK], axes_DD[:, :best]) for start in starts])


def _bounded(vectors_BD: torch.Tensor, axes_DK: torch.Tensor) -> torch.Tensor:
    """The coordinates on K axes, and the length of what is left, [B, K + 1]."""
    inside = vectors_BD @ axes_DK
    left = (vectors_BD.square().sum(dim=1) - inside.square().sum(dim=1)).clamp(min=0)
    return torch.cat([inside, left.sqrt()[:, None]], dim=1)
