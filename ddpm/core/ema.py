"""Averaged weights: what is sampled from and saved."""

import copy

import torch
from torch import Tensor

from ddpm.core.unet import UNet


class EMA:
    """The exponential moving average of the weights, which is what is sampled from and saved.

    The decay warms up as min(decay, (1 + step) / (10 + step)), a common choice (TensorFlow's moving averages have it),
    so that the initial weights are soon forgotten.
    """

    def __init__(self, model: UNet, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._average: list[Tensor] = list(self.model.parameters())
        self._live: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._live, 1 - decay)
