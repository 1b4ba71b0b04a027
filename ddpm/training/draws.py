"""The random numbers of one step, and which noise goes to which image."""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
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
        noise: standard normal (B, C, H, W), of all processes.
        hidden: which labels are hidden, bool (b,); None: the network has no label for that.
    """

    flip: Tensor | None
    t: Tensor
    noise: Tensor
    hidden: Tensor | None


def draw(setup: Setup, train: Train, shape: torch.Size, step: int) -> Draws:
    """The draws of step `step`, which also seeds torch for the step's dropout.

    They are drawn for the whole batch, and a process takes its share, so that they do not depend on the number of
    processes. (Dropout does: each process draws its own.)

    Args:
        shape: of an image, (C, H, W).
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
    """The noise (b, C, H, W) of each of this process's images x0 (b, C, H, W), out of that of the whole batch.

    independent: in the order in which it was drawn. assigned: each image of the batch takes another one, so that the
    sum of the squared distances is the least (immiscible diffusion, Li et al. 2024, arXiv 2406.12303, algorithm 1).

    Distances are sums of whole numbers, which float64 holds exactly: they, and so the assignment and its ties, are the
    same on every processor and for every number of processes.
    """
    mine = processes.share(train.batch_size)
    if train.noise_coupling == "independent":
        return noise[mine]
    # |x - n|^2 = |x|^2 + |n|^2 - 2 x n, and an assignment changes the last part alone
    levels, draws = (x0 * 255).round().double().flatten(1), (noise * 256).round().double().flatten(1)
    cost = processes.gathered((-levels @ draws.T).cpu())
    _, chosen = linear_sum_assignment(cost.numpy())
    return noise[torch.from_numpy(chosen)[mine].to(noise.device)]
