"""A moving average of the trained weights, kept beside them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class MovingAverage:
    """average = decay * average + (1 - decay) * weight after each step, from the weights at the start.

    Args:
        named: Names and parameters; those that are not trained are left out.
        decay: Between 0 and 1; 0.999 looks back about a thousand steps.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self._parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.state = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of now."""
        for name, parameter in self._parameters.items():
            self.state[name].lerp_(parameter, 1 - self.decay)

    @torch.no_grad()
    def use(self) -> None:
        """Puts the average in the weights' place."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.state[name])
