"""Exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class MovingAverage:
    """Maintains average = decay * average + (1 - decay) * weight, starting from the initial weights.

    Args:
        named: Names and parameters; frozen parameters are ignored.
        decay: Between 0 and 1; 0.999 averages over about a thousand steps.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self._parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.state = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average with the current weights."""
        for name, parameter in self._parameters.items():
            self.state[name].lerp_(parameter, 1 - self.decay)

    @torch.no_grad()
    def use(self) -> None:
        """Replaces the weights by their average."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.state[name])
