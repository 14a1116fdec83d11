"""Scores from ranks, their means over tasks, and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

META_TASKS = (
    "classification",
    "vqa",
    "retrieval",
    "grounding",
    "video_classification",
    "video_qa",
    "video_retrieval",
    "moment_retrieval",
    "vidore_v1",
    "vidore_v2",
    "visrag",
    "visdoc_ood",
    "text_retrieval",
    "reasoning_retrieval",
    "instruction_retrieval",
    "long_retrieval",
    "condition_retrieval",
    "audio_classification",
    "audio_retrieval",
    "audio_grounding",
    "tool_retrieval",
    "gui_control",
    "memory_retrieval",
)
MODALITIES = ("image", "video", "visdoc", "text", "audio", "agent")
SPLITS = ("ind", "ood")
GROUPS = (*META_TASKS, *MODALITIES, *SPLITS, "overall")
CUTS = (1, 5, 10)


@dataclass(frozen=True, slots=True)
class Ranked:
    """Ranks of the relevant candidates of one query.

    Attributes:
        ranks: Rank of each relevant candidate, from 1; exact up to the largest k that is asked for. Empty: no
            candidate is relevant, and every metric is 0.
        gains: Relevance of each, in the same order; empty: 1 each.
        again: Rank and gain of each further place of a relevant candidate that is listed several times. Only NDCG
            counts these, as the reference evaluation does; it can then exceed 1.
    """

    ranks: tuple[int, ...]
    gains: tuple[float, ...] = ()
    again: tuple[tuple[int, float], ...] = ()

    @property
    def graded(self) -> tuple[float, ...]:
        """Gains; 1 each if none are given."""
        return self.gains or (1.0,) * len(self.ranks)


def hit(query: Ranked, k: int) -> float:
    """1 where a relevant candidate is among the first k."""
    return float(any(rank <= k for rank in query.ranks))


def precision(query: Ranked, k: int) -> float:
    """Share of the first k that is relevant; missing candidates count as not relevant."""
    return sum(rank <= k for rank in query.ranks) / k


def recall(query: Ranked, k: int) -> float:
    """Share of the relevant candidates that is among the first k."""
    return sum(rank <= k for rank in query.ranks) / max(1, len(query.ranks))


def f1(query: Ranked, k: int) -> float:
    """Harmonic mean of precision and recall."""
    p, r = precision(query, k), recall(query, k)
    return 2 * p * r / (p + r) if p + r else 0.0


def average_precision(query: Ranked, k: int) -> float:
    """Precision at each relevant candidate among the first k, over all relevant ones (as trec_eval's map_cut)."""
    return _precision_sum(query, k) / max(1, len(query.ranks))


def average_precision_capped(query: Ranked, k: int) -> float:
    """As `average_precision`, but over min(k, relevant), as in the reference evaluation of MMEB."""
    return _precision_sum(query, k) / max(1, min(k, len(query.ranks)))


def reciprocal_rank(query: Ranked, k: int) -> float:
    """1 / rank of the first relevant candidate, 0 beyond k."""
    first = min(query.ranks, default=k + 1)
    return 1 / first if first <= k else 0.0


def ndcg_linear(query: Ranked, k: int) -> float:
    """Discounted gain over that of the best order (Jarvelin and Kekalainen 2002, discount log2(rank + 1))."""
    return _ndcg(query, k, lambda gain: gain)


def ndcg_exponential(query: Ranked, k: int) -> float:
    """The same with gain 2**relevance - 1 (Burges et al. 2005)."""
    return _ndcg(query, k, lambda gain: 2**gain - 1)


def _precision_sum(query: Ranked, k: int) -> float:
    within = sorted(rank for rank in query.ranks if rank <= k)
    return sum(found / rank for found, rank in enumerate(within, start=1))


def _ndcg(query: Ranked, k: int, worth: Callable[[float], float]) -> float:
    gains = [worth(gain) for gain in query.graded]
    ideal = sum(gain / math.log2(place + 1) for place, gain in enumerate(sorted(gains, reverse=True)[:k], start=1))
    found = [*zip(query.ranks, gains, strict=True), *((rank, worth(gain)) for rank, gain in query.again)]
    reached = sum(gain / math.log2(rank + 1) for rank, gain in found if rank <= k)
    return reached / ideal if ideal else 0.0


METRICS: dict[str, Callable[[Ranked, int], float]] = {
    "hit": hit,
    "ndcg_linear": ndcg_linear,
    "ndcg_exponential": ndcg_exponential,
    "precision": precision,
    "recall": recall,
    "f1": f1,
    "map": average_precision,
    "mrr": reciprocal_rank,
}


TASK_METRICS = tuple(
    f"{name}@{k}" for name in ("hit", "ndcg", "ndcg_linear", "ndcg_exponential", "precision", "recall") for k in CUTS
)
"""Metrics of tasks: those whose chance has a closed form."""


def values_of(name: str, queries: Sequence[Ranked]) -> np.ndarray:
    """One metric such as `hit@1` of each query, shape [Q]; "ndcg" is the linear one."""
    metric, _, cut = name.partition("@")
    function = METRICS["ndcg_linear" if metric == "ndcg" else metric]
    return np.array([function(query, int(cut)) for query in queries])


def chance_of(name: str, gains: Sequence[float], num_candidates: int) -> float:
    """Expected score of a random order of the candidates.

    Args:
        name: One of `TASK_METRICS`, such as `hit@1`.
        gains: Gains of the relevant candidates.
        num_candidates: Number of candidates, relevant ones included.
    """
    metric, _, cut = name.partition("@")
    k, num_relevant = min(int(cut), num_candidates), len(gains)
    if metric == "hit":
        draws = math.comb(num_candidates, k)
        return (draws - math.comb(num_candidates - num_relevant, k)) / draws
    if metric == "precision":
        return k / int(cut) * num_relevant / num_candidates
    if metric == "recall":
        return k / num_candidates if num_relevant else 0.0
    worth = [2**gain - 1 if metric == "ndcg_exponential" else gain for gain in gains]
    discounts = [1 / math.log2(place + 1) for place in range(1, k + 1)]
    ideal = sum(gain * discount for gain, discount in zip(sorted(worth, reverse=True), discounts, strict=False))
    return sum(worth) / num_candidates * sum(discounts) / ideal if ideal else 0.0


def all_metrics(queries: Sequence[Ranked], cuts: Sequence[int] = CUTS) -> dict[str, float]:
    """Mean over queries of every metric at every cutoff."""
    return {f"{name}@{k}": float(values_of(f"{name}@{k}", queries).mean()) for name in METRICS for k in cuts}


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean score over queries like these.

    Scores of 0 and 1 have Wilson's interval (JASA 22, 1927), which is right without a hit, too. All others have the
    percentile interval of 1,000 resampled means (bootstrap; Efron 1979), the same at each call.

    Args:
        values: Score of each query, shape [Q].
        level: How often such an interval holds the mean over all possible queries.
    """
    if np.isin(values, (0, 1)).all():
        return _wilson(float(values.mean()), len(values), NormalDist().inv_cdf((1 + level) / 2))
    random = np.random.default_rng(0)
    # Queries of equal score are interchangeable, so it suffices to draw how often each score occurs.
    scores, counts = np.unique(values, return_counts=True)
    drawn = random.multinomial(len(values), counts / len(values), size=1000)
    low, high = np.quantile(drawn @ scores / len(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _wilson(share: float, number: int, z: float) -> tuple[float, float]:
    center = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z * math.sqrt(share * (1 - share) / number + (z / (2 * number)) ** 2) / (1 + z * z / number)
    return max(center - half, 0.0), min(center + half, 1.0)


def group_means(scores: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Unweighted mean over the tasks of each group, then over all tasks as "overall"; empty groups are left out.

    Args:
        scores: Score by task.
        groups: The groups that each task belongs to.
    """
    members: dict[str, list[float]] = {name: [] for name in GROUPS}
    for task, score in scores.items():
        for group in (*groups[task], "overall"):
            members[group].append(score)
    return {group: sum(values) / len(values) for group, values in members.items() if values}
