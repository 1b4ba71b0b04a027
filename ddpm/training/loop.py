"""The training loop: steps, curves, previews, saved states, and the way back after a stop."""

import math
import signal
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpm.config.schema import Train
from ddpm.core import samplers
from ddpm.core.diffusion import GaussianDiffusion
from ddpm.core.ema import EMA
from ddpm.core.pixels import to_model_range, to_pixels
from ddpm.core.unet import UNet
from ddpm.data.batches import batches, worker_faults
from ddpm.data.prepared import Images
from ddpm.errors import UserError
from ddpm.pictures import grid
from ddpm.runtime import processes
from ddpm.runtime.device import explain_out_of_memory, peak_memory
from ddpm.runtime.progress import Progress, seconds_since_start
from ddpm.runtime.resume import ResumeState
from ddpm.runtime.signals import Interrupted, signals_deferred
from ddpm.runtime.tracking import Tracker
from ddpm.training.curves import Window
from ddpm.training.held_out import DRAWS, HeldOutLoss
from ddpm.training.setup import Setup
from ddpm.training.step import optimizer_step

PREVIEW_IMAGES = 36  # images in each grid of a training
PREVIEW_STEPS = 25  # DDIM steps of a preview: the more there are, the less time is left to train
MOST_TIMES = 250  # previews of a training, so that a long one on a small folder does not fill the disk
PREVIEW_SHARE, HELD_OUT_SHARE = 0.25, 0.05  # of the time of the training, at most


def memory_advice(train: Train) -> str:
    """The settings to change where memory runs out: first the least train.accumulation that halves what a step holds,
    with the same result to rounding, where the batch can be divided further."""
    images, now = train.batch_size // processes.size(), train.accumulation
    parts = [k for k in range(now + 1, images + 1) if images % k == 0]
    advice = []
    if parts:
        more = next((k for k in parts if k >= 2 * now), parts[-1])
        advice.append(f"set train.accumulation={more} (the same step in parts of {images // more} images)")
    if not train.activation_checkpointing:
        advice.append("set train.activation_checkpointing=true")
    if train.precision in ("auto", "fp32"):
        advice.append("set train.precision=bf16 (fp16 on a GPU without bf16)")
    return ", ".join([*advice, "lower train.batch_size or model.base_channels"])


def epochs_between(asked: int, evaluations: int, share: float, epoch: int, whole: int) -> int:
    """The least multiple of `asked` epochs at which what is done beside the training is neither the main work nor too
    many files.

    Args:
        asked: epochs between two times; 0 for never.
        evaluations: forward passes of one time.
        share: of the training's time, at most.
        epoch: training images per epoch.
        whole: training images in all.
    """
    if not asked:
        return 0
    apart = max(evaluations / (3 * share), whole / MOST_TIMES)  # a training image costs three forward passes
    return asked * math.ceil(apart / (asked * epoch))


def preview(model: UNet, diffusion: GaussianDiffusion, seed: int, device: torch.device) -> Tensor:
    """The same few images each time, by DDIM, of each class in turn: float32 (PREVIEW_IMAGES, C, H, W) in [-1, 1]."""
    noise = samplers.ImageNoise(seed, range(PREVIEW_IMAGES), model.config, device)
    path = samplers.timesteps(diffusion.timesteps, min(PREVIEW_STEPS, diffusion.timesteps), "trailing")
    labels = torch.arange(PREVIEW_IMAGES, device=device) % classes if (classes := model.config.classes) else None
    *_, last = samplers.ddim(samplers.conditioned(model, labels), diffusion, noise(), path, noise)
    return last.x


class Best(NamedTuple):
    """The least held-out loss so far: its step, and the averages' weights there."""

    step: int
    loss: float
    weights: dict[str, Tensor]


class Clock:
    """The times of a training, in seconds."""

    def __init__(self) -> None:
        self._began = self._saved_at = self._logged_at = time.monotonic()
        self.busy = 0.0  # inside forward, backward and step
        self.save_cost = 0.0  # of the last save

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count what is done here as busy."""
        before = time.monotonic()
        yield
        self.busy += time.monotonic() - before

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure a save."""
        before = time.monotonic()
        yield
        self._saved_at = time.monotonic()
        self.save_cost = self._saved_at - before

    def since_log(self) -> float:
        """Seconds since this was last asked."""
        before, self._logged_at = self._logged_at, time.monotonic()
        return self._logged_at - before

    def since_save(self) -> float:
        """Seconds since the last save."""
        return time.monotonic() - self._saved_at

    def wall(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began


class Training:
    """A training that may stop after any step, and whose next run ends in the same bytes.

    Args:
        setup: what it changes and computes with.
        train: the parameters of the loop.
        images: the training split; its labels are used where the network is class-conditional.
        held_out: the test split, for the held-out loss alone.
        state: holds the state of an earlier run, if there was one; the pictures are in its folder.
    """

    def __init__(
        self, setup: Setup, train: Train, images: Images, held_out: Images, tracker: Tracker, state: ResumeState
    ) -> None:
        self.setup, self.train, self.tracker, self.state = setup, train, tracker, state
        self.images = images
        self.pictures = state.folder / "pictures"
        self.averages = [EMA(setup.model, width) for width in train.ema_widths]
        self.held_out = HeldOutLoss(held_out, setup.diffusion, train.seed, train.batch_size)
        self.best: Best | None = None  # where train.keep asks for it
        self.step = self.start = 0  # steps that are done, and that an earlier run had done
        self.rate = 0.0  # the last step's learning rate
        self.history: list[tuple[int, dict[str, float]]] = []
        bound = ("bound_loss",) if setup.diffusion.config.learn_variance else ()
        self.window = Window(("loss", *bound, "grad_norm"), min(train.log_every_steps, setup.total), setup.device)
        self.parts: dict[str, Any] = {
            "model": setup.model,
            "averages": nn.ModuleList(average.model for average in self.averages),
            "optimizer": setup.optimizer,
            "schedule": setup.schedule,
            "scaler": setup.scaler,
        }
        self.preview_every = self._every("preview_every_epochs", PREVIEW_IMAGES * PREVIEW_STEPS, PREVIEW_SHARE)
        self.held_out_every = self._every("held_out_every_epochs", DRAWS, HELD_OUT_SHARE)

    def run(self) -> dict[float, UNet]:
        """Train to the end, resuming from the state if it holds one; return the averages by their widths.

        Raises:
            UserError: a transform that fails, no memory left, or a loss that is no longer finite.
            Interrupted: SIGTERM or SIGINT came; the state is saved.
        """
        self.resume()
        self.log_inputs()
        with (
            signals_deferred() as signals,
            explain_out_of_memory(memory_advice(self.train)),
            worker_faults(self.train.workers),
            closing(self.batches()) as steps,
            self.progress() as bar,
        ):
            self.clock = Clock()  # starts now
            for images, labels in steps:
                self.optimizer_step(images, labels)
                if self.at_curve_point():
                    self.log_curve(bar)
                bar.update(self.train.batch_size)
                if self.at_held_out_point():
                    self.log_held_out()
                if self.at_preview():
                    self.log_preview()
                if processes.any_process(self.save_is_due() or bool(signals)):
                    self.save()
                    if processes.any_process(bool(signals)):
                        raise Interrupted(signals[0] if signals else signal.SIGTERM)
        return self.finish()

    def resume(self) -> None:
        """Continue where the saved state ends, if there is one, with the curves up to there."""
        if (saved := self.state.load()) is not None:
            self.step = self.start = saved["step"]
            self.history = saved["history"]
            self.window.refill(saved["window"])
            self.best = saved["best"] and Best(*saved["best"])
            for name, part in self.parts.items():
                if saved[name]:  # precision: auto may have taken one without a scaler, on another GPU
                    part.load_state_dict(saved[name])
            print(f"resuming at step {self.start} of {self.setup.total}", flush=True)
        for step, metrics in self.history:
            self.tracker.log(step, metrics)

    def batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """The batches of the steps that are left: images (b, C, H, W) and labels (b,)."""
        return batches(
            self.images,
            batch_size=self.train.batch_size,
            seed=self.train.seed,
            steps=range(self.start, self.setup.total),
            transforms=self.train.transforms,
            workers=self.train.workers,
            pin_memory=self.setup.device.type == "cuda",
        )

    def progress(self) -> Progress:
        """A bar over all images, those of an earlier run included."""
        size = self.train.batch_size
        return Progress(self.setup.total * size, "train", "img", self.start * size)

    def optimizer_step(self, images: Tensor, labels: Tensor) -> None:
        """Change the weights, their average and the learning rate."""
        with self.clock.working():
            self.window.add(optimizer_step(self.setup, self.train, images, labels, self.step))
            for average in self.averages:
                average.update(self.step)
            self.rate = self.setup.optimizer.param_groups[0]["lr"]
            self.setup.schedule.step()
        if self.step == self.start:
            print(f"first step after {seconds_since_start():.1f} s", flush=True)
        self.step += 1

    def at_curve_point(self) -> bool:
        """Every log_every_steps steps, and at the end."""
        return self.step % self.train.log_every_steps == 0 or self.step == self.setup.total

    def log_curve(self, bar: Progress) -> None:
        """Record the means since the last point, and how fast they were trained.

        Raises:
            UserError: the training diverged.
        """
        metrics = self.window.take(self.step - 1) | {"learning_rate": self.rate} | self.loss_scale()
        self.history.append((self.step, metrics))
        speed = self.train.log_every_steps * self.train.batch_size / self.clock.since_log()
        machine = {"images_per_second": speed, "peak_memory_gib": peak_memory(self.setup.device)}
        self.tracker.log(self.step, metrics, machine)
        bar.set_postfix(step=self.step, loss=f"{metrics['loss']:.4f}", refresh=False)

    def loss_scale(self) -> dict[str, float]:
        """The scale of the loss after the last step, in fp16 alone.

        Raises:
            UserError: it has fallen so far that it is not the scale that makes the gradients overflow.
        """
        if not self.setup.scaler.is_enabled():
            return {}
        if (scale := self.setup.scaler.get_scale()) < 1:
            raise UserError(
                f"training diverged: the gradient overflows fp16 at step {self.step - 1} and before, at a loss scale "
                f"of {2 * scale:g}; lower optimizer.lr, or set train.precision=fp32"
            )
        return {"loss_scale": scale}

    def at_held_out_point(self) -> bool:
        """As `at_preview`, by its own setting, and at the end of the training."""
        due = self._ends_epoch(self.held_out_every) or self.step == self.setup.total
        return due and processes.rank() == 0

    def log_held_out(self) -> None:
        """Record the held-out loss of the first average; keep all averages where it is the least so far."""
        losses = self.held_out(self.averages[0].model)
        self.history.append((self.step, losses))
        self.tracker.log(self.step, losses)
        loss = losses["held_out_loss"]
        if self.train.keep == "best" and (self.best is None or loss < self.best.loss):
            weights = {name: value.clone() for name, value in self.parts["averages"].state_dict().items()}
            self.best = Best(self.step, loss, weights)

    def at_preview(self) -> bool:
        """At the end of an epoch, as often as `epochs_between` says; in the first process alone."""
        return self._ends_epoch(self.preview_every) and processes.rank() == 0

    def log_preview(self) -> None:
        """Record a grid of samples of the averaged network."""
        pixels = to_pixels(preview(self.averages[0].model, self.setup.diffusion, self.train.seed, self.setup.device))
        name = f"samples_epoch_{self.step // self.setup.per_epoch:05d}"
        self.tracker.log_picture(self.step, name, grid(pixels), self.pictures)

    def log_inputs(self) -> None:
        """Record one batch as the network sees it, and the noise that the previews start from."""
        if processes.rank():
            return
        p = self.train
        one = batches(self.images, batch_size=p.batch_size, seed=p.seed, steps=range(1), transforms=p.transforms)
        x0 = to_model_range(next(one)[0][:PREVIEW_IMAGES])
        self.tracker.log_picture(0, "inputs", grid(to_pixels(x0)), self.pictures)
        noise = samplers.ImageNoise(p.seed, range(PREVIEW_IMAGES), self.setup.model.config, self.setup.device)()
        self.tracker.log_picture(0, "noise", grid(to_pixels(noise)), self.pictures)

    def save_is_due(self) -> bool:
        """Every save_every_seconds seconds, and at the end of each epoch; in the first process alone.

        Not at the end of epochs that are so short that saving would take over 1 % of the time.
        """
        wait = self.train.save_every_seconds
        if self.step % self.setup.per_epoch == 0:
            wait = min(wait, 100 * self.clock.save_cost)
        return self.clock.since_save() > wait and processes.rank() == 0

    def save(self) -> None:
        """Save all that the next run needs to end in the same bytes.

        Raises:
            UserError: a loss is not finite; the last good state is kept.
        """
        with self.clock.saving():
            progress = {"step": self.step, "history": self.history, "window": self.window.check(self.step - 1)}
            progress["best"] = self.best and tuple(self.best)
            self.state.save({name: part.state_dict() for name, part in self.parts.items()} | progress)

    def finish(self) -> dict[float, UNet]:
        """Print the cost of the training; return the averages, of the step that train.keep asks for."""
        if self.setup.device.type == "cuda":
            torch.cuda.synchronize()  # so that the wall time is right
        wall = self.clock.wall()
        print(
            f"{self.setup.total * self.train.batch_size:,} images in {wall:.0f} s, {self.clock.busy / wall:.1%} in "
            f"forward, backward and step; peak memory {peak_memory(self.setup.device):.2f} GiB",
            flush=True,
        )
        if self.best:
            self.parts["averages"].load_state_dict(self.best.weights)
            print(f"kept the averages of step {self.best.step}, with the least held-out loss: {self.best.loss:.4f}")
        return {average.width: average.model for average in self.averages}

    def _ends_epoch(self, every: int) -> bool:
        """Whether the last step ended an epoch whose number is a multiple of `every`; never where that is 0."""
        epoch, within = divmod(self.step, self.setup.per_epoch)
        return bool(every) and within == 0 and epoch % every == 0

    def _every(self, setting: str, evaluations: int, share: float) -> int:
        """The epochs between two times of what a setting of `train` asks for; prints where they are more than that."""
        p, epoch = self.train, self.setup.per_epoch * self.train.batch_size
        asked = getattr(p, setting)
        every = epochs_between(asked, evaluations, share, epoch, self.setup.total * p.batch_size)
        if every > asked:
            print(f"train.{setting} = {asked}: epochs are short, so {every} epochs are between two")
        return every
