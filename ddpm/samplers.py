"""From noise to images. Every sampler has one signature and yields the state after each network evaluation."""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm.diffusion import GaussianDiffusion
from ddpm.errors import UserError
from ddpm.seeding import generator
from ddpm.unet import UNetConfig

Spacing = Literal["leading", "trailing", "linear", "quadratic"]
Variance = Literal["fixed_small", "fixed_large"]


class Step(NamedTuple):
    """The timestep that was left, the state x_{t-1} after it, and the clipped prediction of x_0 made there."""

    t: int
    x: Tensor
    x0: Tensor


def timesteps(total: int, steps: int, spacing: Spacing) -> list[int]:
    """The timesteps that a sampler visits, from noisy to clean: distinct integers in [0, total).

    leading, trailing and linear as in Lin et al. 2023, table 2; quadratic as in Song et al. 2021, appendix
    D.2, where rounding makes neighbours coincide at small t, so that fewer than `steps` may come back.

    Raises:
        UserError: steps is not in 1 ... total.
    """
    if not 1 <= steps <= total:
        raise UserError(f"params.yaml: sample.steps = {steps}: must be from 1 to {total}, the timesteps of the model")
    chosen: np.ndarray
    if spacing == "leading":
        chosen = np.arange(steps) * (total // steps)
    elif spacing == "trailing":
        chosen = np.round(np.arange(total, 0, -total / steps)) - 1
    elif spacing == "linear":
        chosen = np.round(np.linspace(0, total - 1, steps))
    else:
        chosen = np.linspace(0, math.sqrt(total * 0.8), steps) ** 2
    return [int(t) for t in np.unique(chosen.astype(np.int64))[::-1]]


class ImageNoise:
    """The standard normal draws of a batch of samples: each call gives the next, float32 (B, C, H, W).

    Sample i draws from (seed, i) alone: first its start noise, then the noise of each step of its path. So
    an image does not depend on the others, on the batch size, or on the device.
    """

    def __init__(self, seed: int, indices: range, config: UNetConfig, device: torch.device) -> None:
        self._generators = [generator(seed, "sample", i) for i in indices]
        self._shape = (config.in_channels, config.sample_size, config.sample_size)
        self._device = device

    def __call__(self) -> Tensor:
        draws = [g.standard_normal(self._shape, dtype=np.float32) for g in self._generators]
        return torch.from_numpy(np.stack(draws)).to(self._device)


@torch.no_grad()
def _denoise(model: torch.nn.Module, diffusion: GaussianDiffusion, x: Tensor, t: int) -> Tensor:
    """The network's prediction of x_0, clipped to [-1, 1] before anything is built from it."""
    batch = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
    return diffusion.predict_x0(x, batch, model(x, batch)).clamp(-1, 1)


def _visits(diffusion: GaussianDiffusion, path: list[int]) -> Iterator[tuple[int, float, float]]:
    """(t, alpha_bar_t, alpha_bar of the timestep that follows), the last of which is 1: no noise is left."""
    for i, t in enumerate(path):
        following = diffusion.alphas_cumprod[path[i + 1]] if i + 1 < len(path) else 1.0
        yield t, float(diffusion.alphas_cumprod[t]), float(following)


def ddpm(
    model: torch.nn.Module,
    diffusion: GaussianDiffusion,
    x: Tensor,
    path: list[int],
    noise: Callable[[], Tensor],
    *,
    variance: Variance = "fixed_small",
    eta: float = 0.0,
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), over all timesteps or a part of them.

    Args:
        x: the start noise, float32 (B, C, H, W).
        path: the timesteps to visit, from `timesteps`.
        noise: gives the next standard normal (B, C, H, W); not called at the last step.
        variance: of x_{t-1} given x_t: fixed_small is beta-tilde (eq. 7), fixed_large is beta.
        eta: not used; DDIM's.
    """
    for t, now, following in _visits(diffusion, path):
        x0 = _denoise(model, diffusion, x, t)
        alpha = now / following  # alpha of the whole stride; with no step skipped, alpha_t
        beta = 1 - alpha
        # eq. 7: the mean of q(x_{t-1} | x_t, x_0)
        x = (math.sqrt(following) * beta / (1 - now)) * x0 + (math.sqrt(alpha) * (1 - following) / (1 - now)) * x
        if following < 1:
            x = x + math.sqrt(beta if variance == "fixed_large" else beta * (1 - following) / (1 - now)) * noise()
        yield Step(t, x, x0)


def ddim(
    model: torch.nn.Module,
    diffusion: GaussianDiffusion,
    x: Tensor,
    path: list[int],
    noise: Callable[[], Tensor],
    *,
    variance: Variance = "fixed_small",
    eta: float = 0.0,
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, eq. 12). eta 0 draws nothing after the start noise; eta 1 is ancestral sampling.

    Arguments as for `ddpm`; `variance` is not used.
    """
    for t, now, following in _visits(diffusion, path):
        x0 = _denoise(model, diffusion, x, t)
        epsilon = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
        sigma = eta * math.sqrt((1 - following) / (1 - now) * (1 - now / following))  # eq. 16
        x = math.sqrt(following) * x0 + math.sqrt(1 - following - sigma**2) * epsilon
        if sigma > 0:
            x = x + sigma * noise()
        yield Step(t, x, x0)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim}
