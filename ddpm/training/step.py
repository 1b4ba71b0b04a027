"""One optimizer step: the only lines that change a weight."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ddpm.config.schema import Train
from ddpm.core.pixels import to_model_range
from ddpm.core.samplers import conditioned
from ddpm.training.draws import coupled, draw
from ddpm.training.setup import Setup


def optimizer_step(setup: Setup, train: Train, images: Tensor, labels: Tensor, step: int) -> Tensor:
    """Change the weights once, by the gradient of one batch; return the values of the curves (n,), on the device.

    These are the simple loss, the bound's part of the objective where the variance is learned, and the gradient's norm
    before clipping.

    Args:
        images: this process's share of the step's images (b, C, H, W), uint8 or float32 in [0, 1].
        labels: int64 (b,), used where the network is class-conditional.
        step: counted from 0.
    """
    config, device = setup.model.config, setup.device
    x0 = to_model_range(images.to(device, non_blocking=True))
    draws = draw(setup, train, x0.shape[1:], step)
    if draws.flip is not None:
        x0 = torch.where(draws.flip, x0.flip(3), x0)
    noise = coupled(train, x0, draws.noise)
    x0 = x0.contiguous(memory_format=setup.kernels.memory_format)
    given = labels.to(device, non_blocking=True) if config.classes else None
    if given is not None and draws.hidden is not None:  # so that guidance is possible (Ho & Salimans 2022, algorithm 1)
        given = given.masked_fill(draws.hidden, config.no_label)  # type: ignore[arg-type]
    setup.optimizer.zero_grad(set_to_none=True)
    losses = _backward(setup, train, (x0, draws.t, noise), given)
    norm = torch.nn.utils.clip_grad_norm_(setup.model.parameters(), train.grad_clip or float("inf"))
    setup.optimizer.step()
    return torch.cat([losses, norm.detach().view(1)])


def _backward(setup: Setup, train: Train, batch: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
    """Add the gradient of a batch (x0, t, noise) in train.accumulation parts; return the mean of each loss (n,)."""
    network, totals = setup.network, torch.zeros((), device=setup.device)
    for part in range(train.accumulation):
        rows = slice(part, None, train.accumulation)
        predict = conditioned(network, None if labels is None else labels[rows])
        last = part == train.accumulation - 1
        # processes exchange gradients once per step
        with network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext():
            with torch.autocast(setup.device.type, dtype=torch.bfloat16, enabled=setup.kernels.precision == "bf16"):
                x0, t, noise = (values[rows] for values in batch)
                losses = setup.diffusion.losses(predict, x0, t, noise, train.weighting)
            (losses.objective.mean() / train.accumulation).backward()
        curves = [losses.simple] if losses.bound is None else [losses.simple, losses.bound]
        totals = totals + torch.stack([values.detach().mean() / train.accumulation for values in curves])
    return totals
