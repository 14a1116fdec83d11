"""Stops training on a non-finite loss, embedding collapse or growing memory."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Sequence
from pathlib import Path

import torch

from vlm2vec.errors import UserError
from vlm2vec.training.config import GuardSettings

SHOWN_ROWS = 5
MIB = 2**20


class Guard:
    """Checks loss, gradient, embeddings and memory after every step.

    Args:
        settings: Limits.
        device: Device whose memory is monitored in addition to that of the process.
    """

    def __init__(self, settings: GuardSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.memory_mib = 0.0
        self._steps = 0
        self._collapsed = 0
        self._settled_mib = 0.0

    def check(self, step: int, loss: float, grad_is_finite: bool, mean_cosine: float, rows: Sequence[str]) -> None:
        """Raises an error if training should stop.

        Args:
            step: Number of the step, from 1.
            loss: Loss of the step.
            grad_is_finite: Whether the gradient contains no NaN or Inf.
            mean_cosine: Mean cosine of different inputs of the batch.
            rows: File and row of the batch's pairs.

        Raises:
            UserError: if training should stop; the message names the step and the batch's rows.
        """
        if not math.isfinite(loss) or not grad_is_finite:
            what = f"loss is {loss}" if not math.isfinite(loss) else "gradient is not finite"
            raise UserError(f"step {step}: {what}; lower train.learning_rate or check {_rows(rows)}")
        self._steps += 1
        alike = mean_cosine > self.settings.collapse_cosine
        self._collapsed = self._collapsed + 1 if alike else 0
        if self._collapsed >= self.settings.collapse_steps:
            raise UserError(
                f"step {step}: the embedding has collapsed: for {self._collapsed} steps different inputs have had a "
                f"mean cosine above {self.settings.collapse_cosine} ({mean_cosine:.6f} now); lower "
                f"train.learning_rate or raise train.temperature; {_rows(rows)}"
            )
        self._watch_memory(step)

    def _watch_memory(self, step: int) -> None:
        self.memory_mib = memory_mib(self.device)
        if self._steps == self.settings.memory_settle_steps:
            self._settled_mib = self.memory_mib
        limit = self.settings.memory_climb_mib
        if limit is not None and self._settled_mib and self.memory_mib > self._settled_mib + limit:
            raise UserError(
                f"step {step}: memory keeps growing: {self.memory_mib:.0f} MiB, {self._settled_mib:.0f} MiB at step "
                f"{step - self._steps + self.settings.memory_settle_steps}; more than guard.memory_climb_mib {limit}; "
                "continue with --resume, or raise the limit"
            )


def memory_mib(device: torch.device) -> float:
    """Returns the memory of the process, plus the memory reserved by the GPU allocator, in MiB."""
    on_device = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
    status = Path("/proc/self/statm")
    if status.is_file():
        held = int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    else:  # without /proc, only the peak is available
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (held + on_device) / MIB


def _rows(rows: Sequence[str]) -> str:
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return "the batch's rows: " + "; ".join(rows[:SHOWN_ROWS]) + more
