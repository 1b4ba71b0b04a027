"""From noise to images. All samplers have the same signature and yield the state after each network evaluation."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm.core.diffusion import GaussianDiffusion, Variance
from ddpm.core.seeding import generator
from ddpm.core.unet import UNet, UNetConfig

Spacing = Literal["leading", "trailing", "linear", "quadratic"]
Model = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, H, W) and t (B,) to the network's output


class Step(NamedTuple):
    """t: the timestep just left. x: the state after it, x_{t-1}. x0: the clipped prediction of x_0 made at t."""

    t: int
    x: Tensor
    x0: Tensor


def timesteps(total: int, steps: int, spacing: Spacing) -> list[int]:
    """The timesteps that a sampler visits, from noisy to clean: `steps` distinct integers in [0, total).

    leading, trailing and linear as in Lin et al. 2023, table 2; quadratic as in Song et al. 2021, appendix D.2, where
    neighbours that rounding makes coincide at small t are moved up to the next free timestep.

    Raises:
        ValueError: steps is not in 1 ... total.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps = {steps}: must be from 1 to {total}, the timesteps of the model")
    chosen: np.ndarray
    if spacing == "leading":
        chosen = np.arange(steps) * (total // steps)
    elif spacing == "trailing":
        chosen = np.round(np.arange(total, 0, -total / steps))[:steps] - 1  # rounding may append a timestep -1
    elif spacing == "linear":
        chosen = np.round(np.linspace(0, total - 1, steps))
    else:
        order = np.arange(steps)
        floor = (np.linspace(0, math.sqrt(total * 0.8), steps) ** 2).astype(np.int64)
        chosen = np.maximum.accumulate(floor - order) + order  # the smallest distinct integers not below `floor`
    return sorted(map(int, chosen), reverse=True)


def conditioned(model: Callable[..., Tensor], labels: Tensor | None) -> Model:
    """Bind labels, int64 (B,), so that the network is a function of x_t and t alone; None: the network takes none."""
    return model if labels is None else partial(model, labels=labels)


def guided(model: UNet, labels: Tensor, scale: float) -> Model:
    """Bind labels to a class-conditional network, with classifier-free guidance (Ho & Salimans 2022, eq. 6).

    The prediction is unconditional + scale * (conditional - unconditional), where scale is their 1 + w: at 1 there is
    no guidance, and one evaluation per step instead of two. The same combination holds for epsilon, x0 and v, which are
    affine in each other. A learned variance stays that of the conditional output.

    Args:
        labels: the class of each image, int64 (B,).
    """
    if scale == 1:
        return conditioned(model, labels)
    both = torch.cat([labels, torch.full_like(labels, model.config.no_label)])  # type: ignore[arg-type]

    def predict(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = model(x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        channels = x.shape[1]
        change = (scale - 1) * (conditional - unconditional)[:, :channels]
        return torch.cat([conditional[:, :channels] + change, conditional[:, channels:]], dim=1)

    return predict


def normal(
    generators: Sequence[np.random.Generator], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """One standard normal draw of `shape` from each generator: float32 (B, *shape)."""
    draws = [g.standard_normal(shape, dtype=np.float32) for g in generators]
    values = torch.from_numpy(np.stack(draws))
    if torch.device(device).type == "cuda":
        values = values.pin_memory()  # without it the CPU would wait for the GPU's work before this copy
    return values.to(device, non_blocking=True)


class ImageNoise:
    """The standard normal draws of a batch of samples: each call returns the next, float32 (B, C, H, W).

    Sample i draws from (seed, i) alone: first its start noise, then the noise of each step of its path. So
    an image does not depend on the others, on the batch size, or on the device.
    """

    def __init__(self, seed: int, indices: range, config: UNetConfig, device: torch.device) -> None:
        self._generators = [generator(seed, "sample", i) for i in indices]
        self._shape = (config.in_channels, config.sample_size, config.sample_size)
        self._device = device

    def __call__(self) -> Tensor:
        return normal(self._generators, self._shape, self._device)


@torch.no_grad()
def _denoise(model: Model, diffusion: GaussianDiffusion, x: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
    """The network's prediction of x_0, clipped to [-1, 1] before anything is built from it, and the share of the
    variance where that is learned."""
    batch = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
    output, share = diffusion.split(model(x, batch))
    return diffusion.predict_x0(x, batch, output).clamp(-1, 1), share


def _visits(diffusion: GaussianDiffusion, path: list[int]) -> Iterator[tuple[int, float, float]]:
    """(t, alpha_bar_t, alpha_bar of the next timestep); after the last timestep alpha_bar is 1: no noise is left.

    Raises:
        ValueError: the path is empty, does not fall, or leaves 0 ... T-1.
    """
    if not path or not diffusion.timesteps > path[0] >= path[-1] >= 0 or any(a <= b for a, b in pairwise(path)):
        raise ValueError(f"path = {path}: must fall from at most {diffusion.timesteps - 1} to at least 0")
    for i, t in enumerate(path):
        following = diffusion.alphas_cumprod[path[i + 1]] if i + 1 < len(path) else 1.0
        yield t, float(diffusion.alphas_cumprod[t]), float(following)


def ddpm(
    model: Model,
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
        noise: returns the next standard normal draw (B, C, H, W); not called at the last step.
        variance: of x_{t-1} given x_t: fixed_small is beta-tilde (eq. 7), fixed_large is beta, learned is the
            network's own between the two (Nichol & Dhariwal 2021, eq. 15).
        eta: not used; an argument of DDIM.
    """
    for t, now, following in _visits(diffusion, path):
        x0, share = _denoise(model, diffusion, x, t)
        alpha = now / following  # alpha of the whole stride; with no step skipped, alpha_t
        beta = 1 - alpha
        # eq. 7: the mean of q(x_{t-1} | x_t, x_0)
        x = (math.sqrt(following) * beta / (1 - now)) * x0 + (math.sqrt(alpha) * (1 - following) / (1 - now)) * x
        if following < 1:
            small = beta * (1 - following) / (1 - now)
            if variance == "learned" and share is not None:
                sigma = torch.exp(0.5 * (math.log(small) + (share + 1) / 2 * math.log(beta / small)))
                x = x + sigma * noise()
            else:
                x = x + math.sqrt(beta if variance == "fixed_large" else small) * noise()
        yield Step(t, x, x0)


def ddim(
    model: Model,
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
        x0, _ = _denoise(model, diffusion, x, t)
        epsilon = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
        sigma = eta * math.sqrt((1 - following) / (1 - now) * (1 - now / following))  # eq. 16
        rest = max(0.0, 1 - following - sigma**2)  # at eta 1 it may be 0, and rounded to below
        x = math.sqrt(following) * x0 + math.sqrt(rest) * epsilon
        if sigma > 0:
            x = x + sigma * noise()
        yield Step(t, x, x0)


def dpm_solver(
    model: Model,
    diffusion: GaussianDiffusion,
    x: Tensor,
    path: list[int],
    noise: Callable[[], Tensor],
    *,
    variance: Variance = "fixed_small",
    eta: float = 0.0,
) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2): second order, from the last two predictions.

    Arguments as for `ddpm`; `noise`, `variance` and `eta` are not used. The first step and the last, which ends
    in the clean image, are of first order.
    """
    before: tuple[Tensor, float] | None = None  # the previous prediction of x_0, and the stride that followed it
    for t, now, following in _visits(diffusion, path):
        x0, _ = _denoise(model, diffusion, x, t)
        if following == 1:
            x = x0
        else:
            stride = _log_snr(following) - _log_snr(now)  # h
            direction = x0
            if before is not None:
                r = before[1] / stride
                direction = x0 + (x0 - before[0]) / (2 * r)
            scale = math.sqrt((1 - following) / (1 - now))
            x = scale * x - math.sqrt(following) * math.expm1(-stride) * direction
            before = x0, stride
        yield Step(t, x, x0)


def _log_snr(alpha_bar: float) -> float:
    """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm_solver": dpm_solver}
