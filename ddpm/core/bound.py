"""The variational bound on the likelihood of images, term by term (Ho et al. 2020, section 3 and 4.3)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ddpm.core.diffusion import GaussianDiffusion, Variance
from ddpm.core.pixels import to_model_range
from ddpm.core.samplers import Model, normal
from ddpm.core.seeding import generator
from ddpm.data.batches import as_tensor, told_labels
from ddpm.runtime.progress import Progress
from ddpm.runtime.resume import Keep, not_kept, slices


@dataclass(frozen=True)
class Bound:
    """The mean over images of each term, in bits a dimension.

    Attributes:
        prior: L_T, what x_T still knows of the image.
        terms: float64 (T,): L_0, the cost of the pixels given x_1, then L_{t} of each step t = 1 ... T-1.
        x0_mse: float64 (T,): the mean squared error of the prediction of x_0 at each t, in [-1, 1] units.
    """

    prior: float
    terms: np.ndarray
    x0_mse: np.ndarray

    @property
    def bits_per_dim(self) -> float:
        """The whole bound: an upper limit of the negative log-likelihood."""
        return float(self.prior + self.terms.sum())

    def rate_distortion(self) -> tuple[np.ndarray, np.ndarray]:
        """What a receiver knows after the steps T-1 ... t, for each t (Ho et al. 2020, section 4.3, figure 5).

        Returns:
            rate: bits a dimension spent so far, (T,). distortion: the root mean squared error of the image that
            it would then draw, in levels of 0 to 255, (T,).
        """
        spent = np.append(np.cumsum(self.terms[::-1])[::-1][1:], 0.0)
        return self.prior + spent, 127.5 * np.sqrt(self.x0_mse)

    def rows(self, ranges: int) -> list[dict[str, float]]:
        """The bound in equal ranges of t, for a plot: bits_per_dim is the sum of the terms in the range; rate and
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
def variational_bound(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    numbers: np.ndarray | None = None,
    *,
    variance: Variance,
    batch_size: int,
    seed: int,
    device: torch.device,
    keep: Keep = not_kept,
) -> Bound:
    """Evaluate every term on every image: T network evaluations an image.

    Args:
        images: uint8 (N, H, W, C).
        labels: int64 (N,) for a class-conditional network: the bound is then on images given their class.
        numbers: the place of each image in its data set, (N,), from which its noise follows, and from nothing else;
            None for 0 ... N-1.
        variance: of the reverse process, as for sampling; fixed_large is the better bound for few training steps.
        keep: keeps the sums of each finished batch.
    """
    steps = diffusion.timesteps
    numbers = np.arange(len(images)) if numbers is None else numbers
    sums = np.zeros((3, steps))  # over images: of the terms, of the squared errors, and (first in its row) of L_T
    with Progress(len(images) * steps, "variational bound", "eval") as bar:

        def one_batch(rows: slice) -> np.ndarray:
            x0 = to_model_range(as_tensor(images[rows]).to(device))
            given = told_labels(model, labels, rows, device)
            draws = [generator(seed, "bound", int(number)) for number in numbers[rows]]
            batch = np.zeros_like(sums)
            batch[2, 0] = diffusion.prior_term(x0).double().sum().item()
            for step in range(steps):
                noise = normal(draws, x0.shape[1:], device)
                term, error = _term(given, diffusion, x0, step, noise, variance)
                batch[0, step] = term.double().sum().item()
                batch[1, step] = error.double().sum().item()
                bar.update(len(x0))
            return batch

        batches = slices(len(images), batch_size)
        kept = keep([(f"bound-{rows.start}", partial(one_batch, rows)) for rows in batches])
        for rows, batch in zip(batches, kept, strict=True):
            sums += batch
            bar.update(rows.stop * steps - bar.n)  # a batch that was kept
    terms, errors, prior = sums / len(images)
    return Bound(float(prior[0]), terms, errors)


def _term(
    model: Model, diffusion: GaussianDiffusion, x0: Tensor, step: int, noise: Tensor, variance: Variance
) -> tuple[Tensor, Tensor]:
    """The term of one timestep and the squared error of its prediction of x_0, each (B,)."""
    t = torch.full((len(x0),), step, device=x0.device)
    x_t = diffusion.q_sample(x0, t, noise)
    output, share = diffusion.split(model(x_t, t))
    predicted = diffusion.predict_x0(x_t, t, output).clamp(-1, 1)
    mean = diffusion.posterior_mean(predicted, x_t, t)
    term = diffusion.bound_term(x0, x_t, t, mean, diffusion.log_variance(t, variance, share))
    return term, (predicted - x0).square().mean(dim=(1, 2, 3))
