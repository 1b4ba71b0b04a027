"""The training loop: optimizer, learning-rate schedule, EMA, resume."""

import inspect
import math
import signal
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from ddpm.config.checks import steps_per_epoch
from ddpm.config.schema import Runtime, TargetNode, Train
from ddpm.config.targets import LR_SCHEDULER, OPTIMIZER, build
from ddpm.core import samplers
from ddpm.core.diffusion import GaussianDiffusion
from ddpm.core.ema import EMA
from ddpm.core.pixels import to_model_range, to_pixels
from ddpm.core.seeding import derive
from ddpm.core.unet import ResnetBlock, UNet, initialise
from ddpm.data.batches import batches, worker_faults
from ddpm.errors import UserError
from ddpm.model_folder import load_weights
from ddpm.pictures import grid
from ddpm.runtime import processes
from ddpm.runtime.device import Kernels, choose_kernels, explain_out_of_memory, peak_memory
from ddpm.runtime.progress import Progress, seconds_since_start
from ddpm.runtime.resume import ResumeState
from ddpm.runtime.signals import Interrupted, signals_deferred
from ddpm.runtime.tracking import Tracker

SHOWN = 36  # images in each grid of a training
HOPELESS = 10.0  # a mean loss above it has wrecked the weights: all targets have a variance of about 1
PREVIEW_STEPS = 25  # DDIM steps of a preview: the more there are, the less time is left to train
MOST_PREVIEWS = 250  # of a training, so that a long one on a small folder does not fill the disk
LENGTHS = ("T_max", "total_iters", "total_steps")  # how the schedulers of torch call the number of steps
MEMORY_ADVICE = (
    "raise train.accumulation (the same result in smaller parts), set train.activation_checkpointing=true or "
    "train.precision=bf16, or lower train.batch_size or model.base_channels"
)


def make_lr_schedule(node: TargetNode | None, optimizer: Optimizer, warmup: int, steps: int) -> LRScheduler:
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


def epochs_per_preview(every: int, epoch: int, whole: int) -> int:
    """The smallest multiple of `every` at which previews are neither the main work nor too many to look at.

    Args:
        every: epochs that are asked for; 0 for no previews.
        epoch: training images per epoch.
        whole: training images in all.
    """
    if not every:
        return 0
    # a training image costs three forward passes, so that previews take a quarter of the training's time at most
    apart = max(SHOWN * PREVIEW_STEPS / 0.75, whole / MOST_PREVIEWS)
    return every * math.ceil(apart / (every * epoch))


def preview(model: UNet, diffusion: GaussianDiffusion, seed: int, device: torch.device) -> Tensor:
    """The same few images each time, by DDIM, of each class in turn: float32 (SHOWN, C, H, W) in [-1, 1]."""
    noise = samplers.ImageNoise(seed, range(SHOWN), model.config, device)
    path = samplers.timesteps(diffusion.timesteps, min(PREVIEW_STEPS, diffusion.timesteps), "trailing")
    labels = torch.arange(SHOWN, device=device) % classes if (classes := model.config.classes) else None
    *_, last = samplers.ddim(samplers.conditioned(model, labels), diffusion, noise(), path, noise)
    return last.x


@dataclass
class Job:
    """What a training works with; `folder` receives the grids."""

    runtime: Runtime
    train: Train
    optimizer: TargetNode
    lr_schedule: TargetNode | None
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
        UserError: no images, a batch that does not divide among the processes, a folder to start from that does not
            fit, a refused setting, a transform that fails, no memory left, or a loss that is no longer finite.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    p, device = job.train, job.device
    if not len(images):
        raise UserError("there are no training images; run the stage prepare_data again")
    if p.batch_size % (processes.size() * p.accumulation):
        raise UserError(
            f"params.yaml: train.batch_size = {p.batch_size}: must be a multiple of {processes.size()} processes x "
            f"train.accumulation = {p.accumulation}"
        )
    per_epoch = steps_per_epoch(len(images), p.batch_size)
    total = p.steps if p.steps is not None else per_epoch * (p.epochs or 0)
    preview_every = epochs_per_preview(p.preview_every_epochs, per_epoch * p.batch_size, total * p.batch_size)
    if p.batch_size > len(images):
        print(f"train.batch_size = {p.batch_size}: more than the {len(images)} images, so each step repeats some")
    if preview_every > p.preview_every_epochs:
        asked = f"train.preview_every_epochs = {p.preview_every_epochs}"
        print(f"{asked}: epochs are short, so previews are {preview_every} epochs apart")
    if p.init_from is None:
        initialise(model, torch.Generator().manual_seed(derive(p.seed, "init")))
    else:
        model.load_state_dict(load_weights(p.init_from, model.config, job.diffusion.config.prediction))
    kernels = choose_kernels(p, job.runtime, device, total)
    model.to(device).to(memory_format=kernels.memory_format).train()
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            module.recompute = p.activation_checkpointing
    ema = EMA(model, p.ema_decay)
    try:
        optimizer: Optimizer = build(job.optimizer.model_dump(by_alias=True), OPTIMIZER, model.parameters())
    except ValueError as error:
        raise UserError(f"params.yaml: optimizer: {error}") from None
    schedule = make_lr_schedule(job.lr_schedule, optimizer, p.warmup_steps, total)
    parts: dict[str, Any] = {"model": model, "ema": ema.model, "optimizer": optimizer, "schedule": schedule}
    history: list[tuple[int, dict[str, float]]] = []
    curves = ("loss", *(["bound_loss"] if job.diffusion.config.learn_variance else []), "grad_norm")
    window = _Window(curves, min(p.log_every_steps, total), device)
    start = 0
    if (saved := state.load()) is not None:
        start, history = saved["step"], saved["history"]
        window.add_all(saved["window"])
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        print(f"resuming at step {start} of {total}", flush=True)
    for step, metrics in history:
        job.tracker.log(step, metrics)
    if processes.rank() == 0:
        _show_inputs(model, images, labels, job)
    network: nn.Module = model
    if processes.size() > 1:
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if kernels.compile:
        network = torch.compile(network)  # type: ignore[assignment]

    def save(step: int) -> float:
        """Save the state, and return how many seconds that took."""
        before = time.monotonic()
        progress = {"step": step, "history": history, "window": window.check(step - 1)}
        state.save({name: part.state_dict() for name, part in parts.items()} | progress)
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
    with (
        signals_deferred() as signals,
        explain_out_of_memory(MEMORY_ADVICE),
        worker_faults(p.workers),
        closing(steps),
        bar,
    ):
        began = saved_at = told_at = time.monotonic()
        cost = 0.0  # of the last save, in seconds
        busy = 0.0  # seconds inside forward, backward and step
        for step, (batch, classes) in enumerate(steps, start):
            before = time.monotonic()
            window.add(_step(model, network, optimizer, batch, classes, step, job, kernels))
            ema.update(step)
            rate = optimizer.param_groups[0]["lr"]
            schedule.step()
            done = step + 1
            busy += time.monotonic() - before
            if step == start:
                print(f"first step after {seconds_since_start():.1f} s", flush=True)
            if done % p.log_every_steps == 0 or done == total:
                metrics = window.take(step) | {"learning_rate": rate}
                history.append((done, metrics))
                now = time.monotonic()
                job.tracker.log(done, metrics, _speed(p.log_every_steps * p.batch_size, now - told_at, device))
                told_at = now
                bar.set_postfix(step=done, loss=f"{metrics['loss']:.4f}", refresh=False)
            bar.update(p.batch_size)
            epoch, within = divmod(done, per_epoch)
            if within == 0 and preview_every and epoch % preview_every == 0 and processes.rank() == 0:
                pixels = to_pixels(preview(ema.model, job.diffusion, p.seed, device))
                job.tracker.log_picture(done, f"samples_epoch_{epoch:05d}", grid(pixels), job.folder)
            # at the end of an epoch too, unless epochs are so short that saving would take over 1 % of the time
            wait = min(p.save_every_seconds, 100 * cost) if within == 0 else p.save_every_seconds
            late = time.monotonic() - saved_at > wait and processes.rank() == 0
            if processes.any_process(late or bool(signals)):
                cost = save(done)
                saved_at = time.monotonic()
                if processes.any_process(bool(signals)):
                    raise Interrupted(signals[0] if signals else signal.SIGTERM)
        if device.type == "cuda":
            torch.cuda.synchronize()  # what was asked for is now done
        wall = time.monotonic() - began
    print(
        f"{bar.n:,} images in {wall:.0f} s, {busy / wall:.1%} in forward, backward and step; "
        f"peak memory {peak_memory(device):.2f} GiB",
        flush=True,
    )
    return ema.model


def _step(
    model: UNet,
    network: nn.Module,
    optimizer: Optimizer,
    batch: Tensor,
    classes: Tensor,
    step: int,
    job: Job,
    kernels: Kernels,
) -> Tensor:
    """One optimizer step; returns the values of the curves (n,), still on the device.

    These are the simple loss, the bound's part of the objective where the variance is learned, and the gradient's norm
    before clipping.

    Args:
        network: the model, as it is called: compiled, or with gradients that are averaged over processes.
        batch: this process's share of the step's images (b, C, H, W), uint8 or float32 in [0, 1]; classes: int64 (b,).
    """
    p, device = job.train, job.device
    x0 = to_model_range(batch.to(device, non_blocking=True))
    # flips, timesteps, noise and hidden labels are drawn for the whole batch: a process takes its share
    mine = processes.share(p.batch_size)
    torch.manual_seed(derive(p.seed, "step", step))
    if p.flip:
        x0 = torch.where(torch.rand(p.batch_size, 1, 1, 1, device=device)[mine] < 0.5, x0.flip(3), x0)
    t = torch.randint(0, job.diffusion.timesteps, (p.batch_size,), device=device)[mine]
    noise = torch.randn((p.batch_size, *x0.shape[1:]), device=device)[mine]
    labels = None
    if model.config.classes:
        labels = classes.to(device, non_blocking=True)
        if model.config.no_label is not None:  # so that guidance is possible (Ho & Salimans 2022, algorithm 1)
            hidden = torch.rand(p.batch_size, device=device)[mine] < p.label_dropout
            labels = labels.masked_fill(hidden, model.config.no_label)
    if processes.size() > 1:
        torch.manual_seed(derive(p.seed, "step", step, processes.rank()))  # dropout
    x0 = x0.contiguous(memory_format=kernels.memory_format)
    optimizer.zero_grad(set_to_none=True)
    totals: Tensor | float = 0.0
    for part in range(p.accumulation):
        rows = slice(part, None, p.accumulation)
        given = samplers.conditioned(network, None if labels is None else labels[rows])
        last = part == p.accumulation - 1
        # processes exchange gradients once a step
        with network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext():
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=kernels.precision == "bf16"):
                losses = job.diffusion.losses(given, x0[rows], t[rows], noise[rows], p.weighting)
            (losses.objective.mean() / p.accumulation).backward()
        shown = [losses.simple] if losses.bound is None else [losses.simple, losses.bound]
        totals += torch.stack([values.detach().mean() / p.accumulation for values in shown])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), p.grad_clip or float("inf"))
    optimizer.step()
    return torch.cat([torch.as_tensor(totals), norm.detach().view(1)])


def _speed(images: int, seconds: float, device: torch.device) -> dict[str, float]:
    return {"images_per_second": images / seconds, "peak_memory_gib": peak_memory(device)}


def _show_inputs(model: UNet, images: np.ndarray, labels: np.ndarray, job: Job) -> None:
    """Record one batch as the network sees it, and the noise that the previews start from."""
    p = job.train
    one = batches(images, labels, batch_size=p.batch_size, seed=p.seed, steps=range(1), transforms=p.transforms)
    x0 = to_model_range(next(one)[0][:SHOWN])
    job.tracker.log_picture(0, "inputs", grid(to_pixels(x0)), job.folder)
    noise = samplers.ImageNoise(p.seed, range(SHOWN), model.config, job.device)()
    job.tracker.log_picture(0, "noise", grid(to_pixels(noise)), job.folder)


class _Window:
    """The values of the curves since their last point, read from the device once per point.

    Args:
        names: of the curves; the first is the loss, the last the gradient's norm.
    """

    def __init__(self, names: tuple[str, ...], size: int, device: torch.device) -> None:
        self._names = names
        self._values = torch.zeros(size, len(names), device=device)
        self._count = 0

    def add(self, values: Tensor) -> None:
        """Take the values (curves,) of one step."""
        self._values[self._count] = values
        self._count += 1

    def add_all(self, values: Tensor) -> None:
        """Continue from the values (n, curves) that `check` gave."""
        self._count = len(values)
        self._values[: self._count] = values

    def check(self, step: int) -> Tensor:
        """The window's values (n, curves) after `step`.

        Raises:
            UserError: one of them is not finite.
        """
        values = processes.mean(self._values[: self._count].to("cpu", copy=True))
        finite = values.isfinite().all(dim=1)
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise UserError(
                f"training diverged: the loss is {values[first, 0]:g} and the gradient's norm {values[first, -1]:g} at "
                f"step {step - self._count + 1 + first}; lower optimizer.lr, or set train.grad_clip. "
                f"The last good state is kept"
            )
        return values

    def take(self, step: int) -> dict[str, float]:
        """The means of the window, which starts anew.

        Raises:
            UserError: a value is not finite, or the loss is far above that of a network that predicts nothing.
        """
        means = dict(zip(self._names, self.check(step).double().mean(dim=0).tolist(), strict=True))
        loss = means["loss"]
        if loss > HOPELESS:
            raise UserError(
                f"training diverged: the mean loss of steps {step - self._count + 1} to {step} is {loss:.1f}, and a "
                f"network that predicts nothing has about 1; lower optimizer.lr, or set train.grad_clip"
            )
        self._count = 0
        return means
