"""How well a network knows images that it was not trained on: the loss by timestep, and the variational bound."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpm.core.bound import Bound, bound_sums
from ddpm.core.diffusion import GaussianDiffusion, Variance
from ddpm.core.pixels import to_model_range
from ddpm.core.samplers import Model, conditioned, normal
from ddpm.core.seeding import generator
from ddpm.data.batches import as_tensor
from ddpm.runtime.progress import Progress
from ddpm.runtime.resume import Store


@dataclass(frozen=True)
class HeldOut:
    """Images that were not trained on.

    Attributes:
        images: uint8 (N, H, W, C).
        labels: int64 (N,) for a class-conditional network, else None.
        numbers: the index of each image in its data set, (N,): its random draws depend on this alone; None for
            0 ... N-1.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    numbers: np.ndarray | None = None

    def given(
        self, model: Callable[..., Tensor], rows: slice | np.ndarray, device: torch.device
    ) -> tuple[Model, Tensor]:
        """The network with the labels of these rows bound, and their images, float32 (B, C, H, W) in [-1, 1]."""
        labels = None if self.labels is None else torch.from_numpy(np.array(self.labels[rows])).to(device)
        return conditioned(model, labels), to_model_range(as_tensor(self.images[rows]).to(device))

    def generators(self, seed: int, purpose: str, rows: slice) -> list[np.random.Generator]:
        """A generator for each image of these rows."""
        numbers = np.arange(len(self.images)) if self.numbers is None else self.numbers
        return [generator(seed, purpose, int(number)) for number in numbers[rows]]


def held_out_loss(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    held_out: HeldOut,
    *,
    bins: int,
    batch_size: int,
    seed: int,
    store: Store | None = None,
) -> tuple[list[float], list[float] | None]:
    """The mean of `image_losses` over the images.

    Returns:
        The mean simple loss of each range, from clean to noisy; their mean is the loss over uniform timesteps. Then the
        same for the bound's part of the objective, or None where no variance is learned.
    """
    losses = image_losses(model, diffusion, held_out, bins=bins, batch_size=batch_size, seed=seed, store=store)
    simple, *bound = losses.mean(axis=1).tolist()
    return simple, bound[0] if bound else None


@torch.no_grad()
def image_losses(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    held_out: HeldOut,
    *,
    bins: int,
    batch_size: int,
    seed: int,
    store: Store | None = None,
) -> np.ndarray:
    """The loss on each of N images that were not trained on, by timestep.

    Each image gets one timestep from each of `bins` equal ranges of [0, T), and fresh noise for each.

    Args:
        model: on the device of `diffusion`.
        store: runs the batches; None: nothing is kept.

    Returns:
        float64 (1, N, bins), or (2, N, bins) where a variance is learned: the simple loss in each range, from clean to
        noisy, and the bound's part of the objective.
    """
    count, device = len(held_out.images), diffusion.device

    def one_batch(rows: slice) -> np.ndarray:
        given, x0 = held_out.given(model, rows, device)
        draws = held_out.generators(seed, "held-out", rows)
        parts = np.zeros((2 if diffusion.config.learn_variance else 1, len(x0), bins))
        for i in range(bins):
            u = (i + np.array([draw.random() for draw in draws])) / bins  # rounding almost never gives 1
            steps = np.minimum(u * diffusion.timesteps, diffusion.timesteps - 1).astype(np.int64)
            t, noise = torch.from_numpy(steps).to(device), normal(draws, x0.shape[1:], device)
            losses = diffusion.losses(given, x0, t, noise)
            parts[0, :, i] = losses.simple.double().cpu().numpy()
            if losses.bound is not None:
                parts[1, :, i] = losses.bound.double().cpu().numpy()
            bar.update(len(x0))
        return parts

    with Progress(count * bins, "held-out loss", "img") as bar:
        batches = (store or Store()).batches("held-out", count, batch_size, one_batch, bar)
        return np.concatenate([batch for _, batch in batches], axis=1)


@torch.no_grad()
def variational_bound(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    held_out: HeldOut,
    *,
    variance: Variance,
    batch_size: int,
    seed: int,
    store: Store | None = None,
) -> Bound:
    """Every term of the bound on every image (given its class, if the network is class-conditional): T network
    evaluations per image, several timesteps at once where a batch has room for more than all images.

    Arguments as for `held_out_loss`; variance as for `bound_sums`.
    """
    count, steps = len(held_out.images), diffusion.timesteps

    def one_batch(rows: slice) -> np.ndarray:
        numbers = np.arange(rows.start, rows.stop)
        at_once = max(k for k in range(1, 1 + max(1, batch_size // len(numbers))) if steps % k == 0)
        given, _ = held_out.given(model, np.tile(numbers, at_once), diffusion.device)
        _, x0 = held_out.given(model, rows, diffusion.device)
        draws = held_out.generators(seed, "bound", rows)
        return bound_sums(
            given,
            diffusion,
            x0,
            lambda: normal(draws, x0.shape[1:], diffusion.device),
            variance,
            lambda: bar.update(len(x0)),
            at_once,
        )

    totals = np.zeros((3, steps))
    with Progress(count * steps, "variational bound", "eval") as bar:
        for _, sums in (store or Store()).batches("bound", count, batch_size, one_batch, bar):
            totals += sums
    return Bound.of(totals, count)
