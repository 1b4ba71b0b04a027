"""The noise levels that a network is trained at: the distribution of its training images' timesteps."""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Levels = Literal["uniform", "normal", "laplace"]


def timestep_shares(alphas_cumprod: np.ndarray, levels: Levels, width: float) -> np.ndarray:
    """The share of the training images that gets each timestep, t = 0 ... T-1: float64 (T,), of sum 1.

    uniform: the same for each (Ho et al. 2020, algorithm 1). normal, laplace: the logarithm of the signal-to-noise
    ratio has this distribution about 0, where signal and noise are alike (Hang & Gu 2024, arXiv 2407.03297, table 1):
    a timestep takes the mass that is nearer to its log SNR than to any other's.

    Args:
        alphas_cumprod: alpha_bar of each timestep, falling: float64 (T,).
        width: the standard deviation of normal, the scale of laplace, in units of log SNR.

    Raises:
        ValueError: the log SNR of the schedule does not cross 0.
    """
    count = len(alphas_cumprod)
    if levels == "uniform":
        return np.full(count, 1 / count)
    log_snr = np.log(alphas_cumprod / (1 - alphas_cumprod))
    if not log_snr[0] > 0 > log_snr[-1]:
        raise ValueError(f"the log SNR runs from {log_snr[0]:.2f} to {log_snr[-1]:.2f}, and must cross 0")
    edges = np.concatenate([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])
    below = np.array([_CDF[levels](edge / width) for edge in edges])
    mass = below[:-1] - below[1:]
    return mass / mass.sum()


def _normal(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _laplace(x: float) -> float:
    return 0.5 * math.exp(x) if x < 0 else 1 - 0.5 * math.exp(-x)


_CDF: dict[str, Callable[[float], float]] = {"normal": _normal, "laplace": _laplace}


class Timesteps:
    """Draws timesteps with these shares, float64 (T,), on a device."""

    def __init__(self, shares: np.ndarray, device: torch.device | str = "cpu") -> None:
        bounds = np.cumsum(shares)[:-1]
        self._bounds = torch.tensor(bounds, dtype=torch.float32, device=device)

    def at(self, u: Tensor) -> Tensor:
        """The timesteps, int64 (B,), at the quantiles u, float32 (B,) in [0, 1]."""
        return torch.searchsorted(self._bounds, u, right=True)
