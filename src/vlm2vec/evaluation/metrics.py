"""Scores from ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

META_TASKS = ("classification", "vqa", "retrieval", "grounding")
SPLITS = ("ind", "ood")


def hit_at(ranks: Sequence[int], k: int) -> float:
    """Share of queries whose best relevant candidate is among the first k; ranks count from 1."""
    return sum(rank <= k for rank in ranks) / len(ranks)


def group_means(scores: Mapping[str, float], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Unweighted mean over the tasks of each group, then over all tasks as "overall"; empty groups are left out.

    Args:
        scores: Score by task.
        groups: The groups that each task belongs to.
    """
    members: dict[str, list[float]] = {name: [] for name in (*META_TASKS, *SPLITS, "overall")}
    for task, score in scores.items():
        for group in (*groups[task], "overall"):
            members[group].append(score)
    return {group: sum(values) / len(values) for group, values in members.items() if values}
