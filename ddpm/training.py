"""The training loop: optimizer, learning-rate schedule, EMA, resume."""

import inspect
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from ddpm import samplers
from ddpm.checkpoint import ResumeState
from ddpm.config import Instance, Train
from ddpm.data import batches
from ddpm.diffusion import GaussianDiffusion
from ddpm.errors import UserError
from ddpm.images import to_model_range, to_pixels
from ddpm.pictures import grid
from ddpm.pipeline_io import load_weights
from ddpm.progress import Progress
from ddpm.runtime import Interrupted, signals_deferred
from ddpm.seeding import derive
from ddpm.targets import LR_SCHEDULER, OPTIMIZER, build
from ddpm.tracking import Tracker
from ddpm.unet import UNet, initialise

SHOWN = 36  # images in each grid of a training
PREVIEW_STEPS = 50  # DDIM steps of a preview
LENGTHS = ("T_max", "total_iters", "total_steps")  # how the schedulers of torch call the number of steps


class EMA:
    """The exponential moving average of the weights, which is what is sampled from and saved.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that the initial weights are soon forgotten.
    """

    def __init__(self, model: UNet, decay: float) -> None:
        self.decay = decay
        self.model = UNet(model.config).to(next(model.parameters()).device).eval().requires_grad_(False)
        self.model.load_state_dict(model.state_dict())
        self._average: list[Tensor] = list(self.model.parameters())
        self._live: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._live, 1 - decay)


def make_lr_schedule(node: Instance | None, optimizer: Optimizer, warmup: int, steps: int) -> LRScheduler:
    """Linear warm-up, then the scheduler that `node` names; None keeps the peak.

    Where the scheduler takes its length (T_max, total_iters or total_steps) and `node` leaves it out, it is the
    number of steps after the warm-up.

    Raises:
        UserError: the scheduler refuses its arguments.
    """
    arguments: dict[str, Any] = {"_target_": "torch.optim.lr_scheduler.ConstantLR", "factor": 1.0}
    if node is not None:
        arguments = node.model_dump(by_alias=True)
    name = arguments["_target_"].rpartition(".")[2]
    accepted = inspect.signature(getattr(torch.optim.lr_scheduler, name)).parameters
    for length in LENGTHS:
        if length in accepted and length not in arguments:
            arguments[length] = max(1, steps - warmup)
    try:
        after: LRScheduler = build(arguments, LR_SCHEDULER, optimizer)
    except ValueError as error:
        raise UserError(f"params.yaml: lr_schedule: {error}") from None
    if not warmup:
        return after
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, after], milestones=[warmup])


def preview(model: UNet, diffusion: GaussianDiffusion, seed: int, device: torch.device) -> Tensor:
    """The same few images each time, by DDIM, of each class in turn: float32 (SHOWN, C, H, W) in [-1, 1]."""
    noise = samplers.ImageNoise(seed, range(SHOWN), model.config, device)
    path = samplers.timesteps(diffusion.timesteps, min(PREVIEW_STEPS, diffusion.timesteps), "trailing")
    labels = torch.arange(SHOWN, device=device) % classes if (classes := model.config.classes) else None
    *_, last = samplers.ddim(partial(model, labels=labels), diffusion, noise(), path, noise)
    return last.x


@dataclass
class Job:
    """What a training works with; `folder` receives the grids."""

    train: Train
    optimizer: Instance
    lr_schedule: Instance | None
    diffusion: GaussianDiffusion
    device: torch.device
    tracker: Tracker
    folder: Path


def train(model: UNet, images: np.ndarray, labels: np.ndarray, job: Job, state: ResumeState) -> UNet:
    """Train to the end, from the state if there is one, and return the averaged network.

    Args:
        model: moved to the job's device; its weights are drawn from the seed, or read from train.init_from.
        images: uint8 (N, H, W, C).
        labels: int64 (N,), used where the network is class-conditional.

    Raises:
        UserError: fewer images than a batch, a folder to start from that does not fit, a refused setting, or a loss
            that is no longer finite.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    p, device = job.train, job.device
    if len(images) < p.batch_size:
        raise UserError(
            f"params.yaml: train.batch_size = {p.batch_size}: there are only {len(images)} training images; "
            f"use at most that many"
        )
    per_epoch = len(images) // p.batch_size
    total = p.steps if p.steps is not None else per_epoch * (p.epochs or 0)
    if p.init_from is None:
        initialise(model, torch.Generator().manual_seed(derive(p.seed, "init")))
    else:
        model.load_state_dict(load_weights(p.init_from, model.config, job.diffusion.config.prediction))
    model.to(device).train()
    ema = EMA(model, p.ema_decay)
    try:
        optimizer: Optimizer = build(job.optimizer.model_dump(by_alias=True), OPTIMIZER, model.parameters())
    except ValueError as error:
        raise UserError(f"params.yaml: optimizer: {error}") from None
    schedule = make_lr_schedule(job.lr_schedule, optimizer, p.warmup_steps, total)
    parts: dict[str, Any] = {"model": model, "ema": ema.model, "optimizer": optimizer, "schedule": schedule}
    history: list[tuple[int, dict[str, float]]] = []
    window = _Window(min(p.log_every, total), device)
    start = 0
    if (saved := state.load()) is not None:
        start, history = saved["step"], saved["history"]
        window.add_all(saved["window"])
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        print(f"resuming at step {start} of {total}", flush=True)
    for step, metrics in history:
        job.tracker.log(step, metrics)
    _show_inputs(model, images, labels, job)

    def save(step: int) -> float:
        """Save the state, and return how many seconds that took."""
        before = time.monotonic()
        curves = {"step": step, "history": history, "window": window.check(step - 1)}
        state.save({name: part.state_dict() for name, part in parts.items()} | curves)
        return time.monotonic() - before

    steps = batches(
        images,
        labels,
        batch_size=p.batch_size,
        seed=p.seed,
        steps=range(start, total),
        transforms=p.transforms,
        workers=p.workers,
        pin_memory=device.type == "cuda",
    )
    bar = Progress(total * p.batch_size, "train", "img", start * p.batch_size)
    with signals_deferred() as signals, bar:
        saved_at = told_at = time.monotonic()
        cost = 0.0  # of the last save, in seconds
        for step, (batch, classes) in enumerate(steps, start):
            loss, norm = _step(model, optimizer, batch, classes, step, job)
            window.add(loss, norm)
            ema.update(step)
            rate = optimizer.param_groups[0]["lr"]
            schedule.step()
            done = step + 1
            if done % p.log_every == 0 or done == total:
                metrics = window.take(step) | {"learning_rate": rate}
                history.append((done, metrics))
                now = time.monotonic()
                job.tracker.log(done, metrics, _speed(p.log_every * p.batch_size, now - told_at))
                told_at = now
                bar.set_postfix(step=done, loss=f"{metrics['loss']:.4f}", refresh=False)
            bar.update(p.batch_size)
            if done % per_epoch == 0 and p.sample_every and done // per_epoch % p.sample_every == 0:
                pixels = to_pixels(preview(ema.model, job.diffusion, p.seed, device))
                job.tracker.log_picture(done, f"samples_epoch_{done // per_epoch:05d}", grid(pixels), job.folder)
            # at the end of an epoch too, unless epochs are so short that saving would take over 1 % of the time
            wait = min(p.save_every, 100 * cost) if done % per_epoch == 0 else p.save_every
            if signals or time.monotonic() - saved_at > wait:
                cost = save(done)
                saved_at = time.monotonic()
            if signals:
                raise Interrupted(signals[0])
    return ema.model


def _step(
    model: UNet, optimizer: Optimizer, batch: Tensor, classes: Tensor, step: int, job: Job
) -> tuple[Tensor, Tensor]:
    """One optimizer step; returns the loss and the gradient's norm before clipping, both still on the device."""
    p = job.train
    batch = batch.to(job.device, non_blocking=True)
    x0 = batch if batch.is_floating_point() else to_model_range(batch)
    torch.manual_seed(derive(p.seed, "step", step))  # flips, timesteps, noise, hidden labels and dropout of this step
    if p.flip:
        x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=job.device) < 0.5, x0.flip(3), x0)
    t = torch.randint(0, job.diffusion.timesteps, (len(x0),), device=job.device)
    noise = torch.randn_like(x0)
    labels = None
    if model.config.classes:
        labels = classes.to(job.device, non_blocking=True)
        if model.config.no_label is not None:  # so that guidance is possible (Ho & Salimans 2022, algorithm 1)
            hidden = torch.rand(len(x0), device=job.device) < p.label_dropout
            labels = labels.masked_fill(hidden, model.config.no_label)
    with torch.autocast(job.device.type, dtype=torch.bfloat16, enabled=p.precision == "bf16"):
        loss = job.diffusion.losses(partial(model, labels=labels), x0, t, noise, p.weighting).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), p.grad_clip or float("inf"))
    optimizer.step()
    return loss.detach(), norm.detach()


def _speed(images: int, seconds: float) -> dict[str, float]:
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {"images_per_second": images / seconds, "gpu_memory_gib": memory}


def _show_inputs(model: UNet, images: np.ndarray, labels: np.ndarray, job: Job) -> None:
    """Record one batch as the network sees it, and the noise that the previews start from."""
    p = job.train
    one = batches(images, labels, batch_size=p.batch_size, seed=p.seed, steps=range(1), transforms=p.transforms)
    first = next(one)[0][:SHOWN]
    x0 = first if first.is_floating_point() else to_model_range(first)
    job.tracker.log_picture(0, "inputs", grid(to_pixels(x0)), job.folder)
    noise = samplers.ImageNoise(p.seed, range(SHOWN), model.config, job.device)()
    job.tracker.log_picture(0, "noise", grid(to_pixels(noise)), job.folder)


class _Window:
    """Losses and gradient norms since the last point of the curves, read from the device once a point."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._values = torch.zeros(size, 2, device=device)
        self._count = 0

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self._values[self._count, 0], self._values[self._count, 1] = loss, norm
        self._count += 1

    def add_all(self, values: Tensor) -> None:
        """Go on from the values (n, 2) that `check` gave."""
        self._count = len(values)
        self._values[: self._count] = values

    def check(self, step: int) -> Tensor:
        """The window's values (n, 2) after `step`.

        Raises:
            UserError: one of them is not finite.
        """
        values = self._values[: self._count].cpu()
        finite = values.isfinite().all(dim=1)
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise UserError(
                f"training diverged: the loss is {values[first, 0]:g} and the gradient's norm {values[first, 1]:g} at "
                f"step {step - self._count + 1 + first}; lower optimizer.lr, or set train.grad_clip. "
                f"The last good state is kept"
            )
        return values

    def take(self, step: int) -> dict[str, float]:
        """The means of the window, which starts anew."""
        loss, norm = self.check(step).double().mean(dim=0).tolist()
        self._count = 0
        return {"loss": loss, "grad_norm": norm}
