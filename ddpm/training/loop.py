"""The training loop: steps, curves, previews, saved states, and the way back after a stop."""

import math
import signal
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from ddpm.config.schema import Train
from ddpm.core import samplers
from ddpm.core.diffusion import GaussianDiffusion
from ddpm.core.ema import EMA
from ddpm.core.pixels import to_model_range, to_pixels
from ddpm.core.unet import UNet
from ddpm.data.batches import batches, worker_faults
from ddpm.data.prepared import Images
from ddpm.pictures import grid
from ddpm.runtime import processes
from ddpm.runtime.device import explain_out_of_memory, peak_memory
from ddpm.runtime.progress import Progress, seconds_since_start
from ddpm.runtime.resume import ResumeState
from ddpm.runtime.signals import Interrupted, signals_deferred
from ddpm.runtime.tracking import Tracker
from ddpm.training.curves import Window
from ddpm.training.setup import Setup
from ddpm.training.step import optimizer_step

PREVIEW_IMAGES = 36  # images in each grid of a training
PREVIEW_STEPS = 25  # DDIM steps of a preview: the more there are, the less time is left to train
MOST_PREVIEWS = 250  # of a training, so that a long one on a small folder does not fill the disk
MEMORY_ADVICE = (
    "raise train.accumulation (the same result in smaller parts), set train.activation_checkpointing=true or "
    "train.precision=bf16, or lower train.batch_size or model.base_channels"
)


def epochs_per_preview(preview_every_epochs: int, epoch: int, whole: int) -> int:
    """The least multiple of `preview_every_epochs` at which previews are neither the main work nor too many.

    Args:
        preview_every_epochs: epochs that are asked for; 0 for no previews.
        epoch: training images per epoch.
        whole: training images in all.
    """
    if not preview_every_epochs:
        return 0
    # a training image costs three forward passes, so that previews take a quarter of the training's time at most
    apart = max(PREVIEW_IMAGES * PREVIEW_STEPS / 0.75, whole / MOST_PREVIEWS)
    return preview_every_epochs * math.ceil(apart / (preview_every_epochs * epoch))


def preview(model: UNet, diffusion: GaussianDiffusion, seed: int, device: torch.device) -> Tensor:
    """The same few images each time, by DDIM, of each class in turn: float32 (PREVIEW_IMAGES, C, H, W) in [-1, 1]."""
    noise = samplers.ImageNoise(seed, range(PREVIEW_IMAGES), model.config, device)
    path = samplers.timesteps(diffusion.timesteps, min(PREVIEW_STEPS, diffusion.timesteps), "trailing")
    labels = torch.arange(PREVIEW_IMAGES, device=device) % classes if (classes := model.config.classes) else None
    *_, last = samplers.ddim(samplers.conditioned(model, labels), diffusion, noise(), path, noise)
    return last.x


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
        state: holds the state of an earlier run, if there was one; the pictures are in its folder.
    """

    def __init__(self, setup: Setup, train: Train, images: Images, tracker: Tracker, state: ResumeState) -> None:
        self.setup, self.train, self.tracker, self.state = setup, train, tracker, state
        self.images = images
        self.pictures = state.folder / "pictures"
        self.ema = EMA(setup.model, train.ema_decay)
        self.step = self.start = 0  # steps that are done, and that an earlier run had done
        self.rate = 0.0  # the last step's learning rate
        self.history: list[tuple[int, dict[str, float]]] = []
        bound = ("bound_loss",) if setup.diffusion.config.learn_variance else ()
        self.window = Window(("loss", *bound, "grad_norm"), min(train.log_every_steps, setup.total), setup.device)
        self.parts: dict[str, Any] = {
            "model": setup.model,
            "ema": self.ema.model,
            "optimizer": setup.optimizer,
            "schedule": setup.schedule,
        }
        self.preview_every = self._epochs_per_preview()

    def run(self) -> UNet:
        """Train to the end, resuming from the state if it holds one; return the EMA network.

        Raises:
            UserError: a transform that fails, no memory left, or a loss that is no longer finite.
            Interrupted: SIGTERM or SIGINT came; the state is saved.
        """
        self.resume()
        self.log_inputs()
        with (
            signals_deferred() as signals,
            explain_out_of_memory(MEMORY_ADVICE),
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
                if self.at_preview():
                    self.log_preview()
                if processes.any_process(self.save_is_due() or bool(signals)):
                    self.save()
                    if processes.any_process(bool(signals)):
                        raise Interrupted(signals[0] if signals else signal.SIGTERM)
        self.finish()
        return self.ema.model

    def resume(self) -> None:
        """Continue where the saved state ends, if there is one, with the curves up to there."""
        if (saved := self.state.load()) is not None:
            self.step = self.start = saved["step"]
            self.history = saved["history"]
            self.window.refill(saved["window"])
            for name, part in self.parts.items():
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
            self.ema.update(self.step)
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
        metrics = self.window.take(self.step - 1) | {"learning_rate": self.rate}
        self.history.append((self.step, metrics))
        speed = self.train.log_every_steps * self.train.batch_size / self.clock.since_log()
        machine = {"images_per_second": speed, "peak_memory_gib": peak_memory(self.setup.device)}
        self.tracker.log(self.step, metrics, machine)
        bar.set_postfix(step=self.step, loss=f"{metrics['loss']:.4f}", refresh=False)

    def at_preview(self) -> bool:
        """At the end of an epoch, as often as `epochs_per_preview` says; in the first process alone."""
        epoch, within = divmod(self.step, self.setup.per_epoch)
        return bool(self.preview_every) and within == 0 and epoch % self.preview_every == 0 and processes.rank() == 0

    def log_preview(self) -> None:
        """Record a grid of samples of the averaged network."""
        pixels = to_pixels(preview(self.ema.model, self.setup.diffusion, self.train.seed, self.setup.device))
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
            self.state.save({name: part.state_dict() for name, part in self.parts.items()} | progress)

    def finish(self) -> None:
        """Wait for queued kernels, so that the wall time is right, and print the cost of the training."""
        if self.setup.device.type == "cuda":
            torch.cuda.synchronize()
        wall = self.clock.wall()
        print(
            f"{self.setup.total * self.train.batch_size:,} images in {wall:.0f} s, {self.clock.busy / wall:.1%} in "
            f"forward, backward and step; peak memory {peak_memory(self.setup.device):.2f} GiB",
            flush=True,
        )

    def _epochs_per_preview(self) -> int:
        p, epoch = self.train, self.setup.per_epoch * self.train.batch_size
        every = epochs_per_preview(p.preview_every_epochs, epoch, self.setup.total * p.batch_size)
        if every > p.preview_every_epochs:
            asked = f"train.preview_every_epochs = {p.preview_every_epochs}"
            print(f"{asked}: epochs are short, so previews are {every} epochs apart")
        return every
