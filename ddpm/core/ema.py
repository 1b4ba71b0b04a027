"""Averaged weights: those that are saved and sampled from."""

import copy
import math

import torch
from torch import Tensor

from ddpm.core.unet import UNet

WIDEST = 0.28  # the largest width: below that of the plain mean of all steps, 1 / sqrt(12) = 0.289


def exponent(width: float) -> float:
    """The exponent gamma of the power-function average of this width (Karras et al. 2024, arXiv 2312.02696, eq. 126).

    Args:
        width: the standard deviation of the average's weights over the steps, as a share of the steps so far; above
            0 and at most `WIDEST`. 0.1 averages over about the last fifth of a training, and 0.05 over a tenth.

    Raises:
        ValueError: the width is out of this range.
    """
    if not 0 < width <= WIDEST:
        raise ValueError(f"width = {width}: must be above 0 and at most {WIDEST}")
    low, high = 0.0, 2.0 / width  # the width falls from 0.289 at gamma = 0, and is below 1 / (gamma + 2)
    while (middle := (low + high) / 2) not in (low, high):
        wide = math.sqrt((middle + 1) / (middle + 3)) / (middle + 2) > width
        low, high = (middle, high) if wide else (low, middle)
    return low


class EMA:
    """The average of the weights over the steps, where step k counts in proportion to k^gamma (Karras et al. 2024,
    eq. 123).

    Its width in steps grows with the training: it is the same share of a short training and of a long one, and the
    initial weights are forgotten at once. A width of 0 means no average: the network's own weights.

    Attributes:
        width: see `exponent`, or 0.
        model: the averaged network, in evaluation mode.
    """

    def __init__(self, model: UNet, width: float) -> None:
        self.width = width
        self._gamma = exponent(width) if width else math.inf
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._average: list[Tensor] = list(self.model.parameters())
        self._live: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after `step` (counted from 0) to the average."""
        kept = (step / (step + 1)) ** (self._gamma + 1) if self.width else 0.0  # beta, eq. 127
        torch._foreach_lerp_(self._average, self._live, 1 - kept)
