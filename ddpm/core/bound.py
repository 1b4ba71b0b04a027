"""The variational bound on the likelihood of images, term by term (Ho et al. 2020, sections 3 and 4.3)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ddpm.core.diffusion import GaussianDiffusion, Variance
from ddpm.core.samplers import Model


@dataclass(frozen=True)
class Bound:
    """Every term of the bound, in bits per dimension, as a mean over images.

    Attributes:
        prior: L_T, the information that x_T still holds about the image.
        terms: float64 (T,): L_0, the cost of the pixels given x_1, then L_{t} of each step t = 1 ... T-1.
        x0_mse: float64 (T,): the mean squared error of the prediction of x_0 at each t, in [-1, 1] units.
        error: the standard error of the whole bound, over images and their noise; NaN for a single image.
    """

    prior: float
    terms: np.ndarray
    x0_mse: np.ndarray
    error: float

    @classmethod
    def of(cls, sums: np.ndarray, count: int) -> "Bound":
        """Build the bound from the sums over `count` images, float64 (3, T), added up from `bound_sums` of each batch.

        Row 0 holds the terms, row 1 the squared errors; row 2 begins with L_T and the square of each image's bound.
        """
        terms, errors, (prior, square, *_) = sums / count
        variance = max(0.0, square - (prior + terms.sum()) ** 2) / (count - 1) if count > 1 else math.nan
        return cls(float(prior), terms, errors, math.sqrt(variance))

    @property
    def bits_per_dim(self) -> float:
        """The whole bound: an upper limit of the negative log-likelihood."""
        return float(self.prior + self.terms.sum())

    def rate_distortion(self) -> tuple[np.ndarray, np.ndarray]:
        """What a receiver knows after the steps T-1 ... t, for each t (Ho et al. 2020, section 4.3, figure 5).

        Returns:
            rate: bits per dimension spent so far, (T,). distortion: the root mean squared error of the image that
            the receiver would then draw, in levels from 0 to 255, (T,).
        """
        spent = np.append(np.cumsum(self.terms[::-1])[::-1][1:], 0.0)
        return self.prior + spent, 127.5 * np.sqrt(self.x0_mse)

    def rows(self, ranges: int) -> list[dict[str, float]]:
        """The bound in equal ranges of t, for a plot: bits_per_dim is the sum of the terms in a range; rate and
        distortion are those at its lower end, as in `rate_distortion`."""
        rate, distortion = self.rate_distortion()
        edges = np.linspace(0, len(self.terms), min(ranges, len(self.terms)) + 1).astype(int)
        return [
            {
                "timestep": int(low),
                "bits_per_dim": float(self.terms[low:high].sum()),
                "rate": float(rate[low]),
                "distortion": float(distortion[low]),
            }
            for low, high in pairwise(edges)
        ]


@torch.no_grad()
def bound_sums(
    model: Model,
    diffusion: GaussianDiffusion,
    x0: Tensor,
    noise: Callable[[], Tensor],
    variance: Variance,
    on_step: Callable[[], object] = lambda: None,
    at_once: int = 1,
) -> np.ndarray:
    """Evaluate every term on a batch: the sums over its images that `Bound.of` takes, float64 (3, T).

    Args:
        x0: float32 (B, C, H, W), levels of 8 bits mapped to [-1, 1].
        noise: returns the next standard normal draw (B, C, H, W), one for each t = 0 ... T-1.
        variance: of the reverse process, as for sampling; fixed_large is the better bound for few training steps.
        on_step: called after each of the T network evaluations.
        at_once: evaluations computed as one batch (at_once * B, C, H, W), in which the images are repeated; must divide
            T. Labels that are bound to `model` must be repeated in the same way.
    """
    sums = np.zeros((3, diffusion.timesteps))
    whole = diffusion.prior_term(x0).double()
    sums[2, 0] = whole.sum().item()
    images = x0.repeat(at_once, 1, 1, 1)
    for first in range(0, diffusion.timesteps, at_once):
        t = torch.arange(first, first + at_once, device=x0.device).repeat_interleave(len(x0))
        noises = torch.cat([noise() for _ in range(at_once)])
        terms, errors = (
            part.double().view(at_once, -1) for part in _term(model, diffusion, images, t, noises, variance)
        )
        sums[0, first : first + at_once] = terms.sum(1).cpu().numpy()
        sums[1, first : first + at_once] = errors.sum(1).cpu().numpy()
        whole += terms.sum(0)
        for _ in range(at_once):
            on_step()
    sums[2, 1] = whole.square().sum().item()
    return sums


def _term(
    model: Model, diffusion: GaussianDiffusion, x0: Tensor, t: Tensor, noise: Tensor, variance: Variance
) -> tuple[Tensor, Tensor]:
    """The term of each image's timestep and the squared error of its prediction of x_0, each (B,)."""
    x_t = diffusion.q_sample(x0, t, noise)
    output, share = diffusion.split(model(x_t, t))
    predicted = diffusion.predict_x0(x_t, t, output).clamp(-1, 1)
    mean = diffusion.posterior_mean(predicted, x_t, t)
    term = diffusion.bound_term(x0, x_t, t, mean, diffusion.log_variance(t, variance, share))
    return term, (predicted - x0).square().mean(dim=(1, 2, 3))
