"""One optimizer step: the only lines that change a weight."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm.config.schema import Train
from ddpm.core.pixels import to_model_range
from ddpm.core.samplers import conditioned
from ddpm.training.draws import coupled, draw
from ddpm.training.setup import Setup

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def optimizer_step(setup: Setup, train: Train, images: Tensor, labels: Tensor, step: int) -> Tensor:
    """Change the weights once, by the gradient of one batch (Ho et al. 2020, algorithm 1).

    In fp16 a step whose scaled gradient overflows changes neither the weights nor the optimizer, and its norm is
    returned as 0. It still counts as a step: learning rate and averages depend on the step's number alone.

    Args:
        images: this process's share of the step's images (b, C, H, W), uint8 or float32 in [0, 1].
        labels: int64 (b,), used where the network is class-conditional.
        step: counted from 0.

    Returns:
        The values of the curves, float32 (n,), on the device: the simple loss, the bound's part of the objective where
        the variance is learned, and the gradient's norm before clipping.
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
    setup.scaler.unscale_(setup.optimizer)  # grad_clip limits the norm of the gradient, not of the scaled one
    norm = torch.nn.utils.clip_grad_norm_(setup.model.parameters(), train.grad_clip or float("inf")).detach().view(1)
    setup.scaler.step(setup.optimizer)
    setup.scaler.update()
    if setup.scaler.is_enabled():
        norm = torch.where(norm.isfinite(), norm, 0.0)
    return torch.cat([losses, norm])


def _backward(setup: Setup, train: Train, batch: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
    """Add the gradient of a batch (x0, t, noise) in train.accumulation parts; return the mean of each loss (n,)."""
    network, totals = setup.network, torch.zeros((), device=setup.device)
    for part in range(train.accumulation):
        rows = slice(part, None, train.accumulation)
        predict = conditioned(network, None if labels is None else labels[rows])
        last = part == train.accumulation - 1
        # processes exchange gradients once per step, with its last part
        with nullcontext() if last else _apart(network):
            precision = AUTOCAST.get(setup.kernels.precision)
            with torch.autocast(setup.device.type, dtype=precision, enabled=precision is not None):
                x0, t, noise = (values[rows] for values in batch)
                losses = setup.diffusion.losses(predict, x0, t, noise, train.weighting)
            setup.scaler.scale(losses.objective.mean() / train.accumulation).backward()
        curves = [losses.simple] if losses.bound is None else [losses.simple, losses.bound]
        totals = totals + torch.stack([values.detach().mean() / train.accumulation for values in curves])
    return totals


def _apart(network: nn.Module) -> AbstractContextManager[None]:
    """A context in which a process does not exchange its gradients."""
    inner = getattr(network, "_orig_mod", network)  # the module that torch.compile has wrapped
    return inner.no_sync() if isinstance(inner, DistributedDataParallel) else nullcontext()
