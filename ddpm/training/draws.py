"""The random numbers of one step, and which noise goes to which image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.config.schema import Train
from ddpm.core.seeding import derive
from ddpm.runtime import processes
from ddpm.training.setup import Setup


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step, for this process's share of b images.

    Attributes:
        flip: which images are mirrored, bool (b, 1, 1, 1); None: flips are off.
        t: timesteps, int64 (b,) in [0, T).
        noise: standard normal (B, C, H, W), for the images of all processes.
        hidden: which labels are replaced by "no label", bool (b,); None where the network has no such label.
    """

    flip: Tensor | None
    t: Tensor
    noise: Tensor
    hidden: Tensor | None


def draw(setup: Setup, train: Train, shape: torch.Size, step: int) -> Draws:
    """Draw the random numbers of a step, and seed torch for the step's dropout.

    The numbers are drawn for the whole batch, and each process takes its share, so that they do not depend on the
    number of processes. (Dropout does: each process draws its own.)

    Args:
        shape: of an image, (C, H, W).
        step: counted from 0.
    """
    count, device, mine = train.batch_size, setup.device, processes.share(train.batch_size)
    torch.manual_seed(derive(train.seed, "step", step))
    flip = torch.rand(count, 1, 1, 1, device=device)[mine] < 0.5 if train.flip else None
    places = torch.rand(count, device=device)
    if train.stratified:  # Kingma et al. 2021, appendix I.1; images are in random order
        places = (torch.arange(count, device=device) + places) / count
    t = setup.timesteps.at(places[mine])
    noise = torch.randn((count, *shape), device=device)
    hidden = None
    if setup.model.config.no_label is not None:
        hidden = torch.rand(count, device=device)[mine] < train.hidden_labels
    if processes.size() > 1:
        torch.manual_seed(derive(train.seed, "step", step, processes.rank()))
    return Draws(flip, t, noise, hidden)


def coupled(train: Train, x0: Tensor, noise: Tensor) -> Tensor:
    """The noise (b, C, H, W) for each of this process's images, picked from the noise of the whole batch.

    independent: in the order in which it was drawn. assigned: images and noise are paired one to one over the whole
    batch so that the sum of the squared distances within the pairs is the least (immiscible diffusion, Li et al. 2024,
    arXiv 2406.12303, algorithm 1).

    Distances are sums of whole numbers, which float64 holds exactly: they, and so the assignment and its ties, are the
    same on every processor and for every number of processes.

    Args:
        x0: this process's images, float32 (b, C, H, W) in [-1, 1].
        noise: standard normal, float32 (B, C, H, W).
    """
    mine = processes.share(train.batch_size)
    if train.noise_coupling == "independent":
        return noise[mine]
    from scipy.optimize import linear_sum_assignment  # 0.4 s that a start without it saves

    # |x - n|^2 = |x|^2 + |n|^2 - 2 x n, and only the last term depends on the assignment
    levels, draws = (x0 * 255).round().double().flatten(1), (noise * 256).round().double().flatten(1)
    cost = processes.gathered((-levels @ draws.T).cpu())
    _, chosen = linear_sum_assignment(cost.numpy())
    return noise[torch.from_numpy(chosen)[mine].to(noise.device)]
