"""The training loop: steps, curves, previews, saved states, and how a training resumes after a stop."""

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
PREVIEW_STEPS = 25  # DDIM steps of a preview: more of them leave less time to train
MOST_TIMES = 250  # previews per training: a long training on a small folder must not fill the disk
PREVIEW_SHARE, HELD_OUT_SHARE = 0.25, 0.05  # of the training's time, at most


def memory_advice(train: Train) -> str:
    """The settings to change where memory runs out, separated by commas.

    If the batch can be divided further, the first is the least train.accumulation that halves the images per part, or
    else the largest; the result is the same to rounding.
    """
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
    """The epochs between two previews (or held-out losses): a multiple of `asked` that bounds their time and number.

    It is the least multiple at which they take at most `share` of the training's time, and are at most `MOST_TIMES`.

    Args:
        asked: the epochs between two that the setting asks for; 0 for never, which gives 0.
        evaluations: forward passes of single images that one preview takes.
        share: of the training's time, at most.
        epoch: training images per epoch.
        whole: training images of all epochs.
    """
    if not asked:
        return 0
    apart = max(evaluations / (3 * share), whole / MOST_TIMES)  # a training image costs three forward passes
    return asked * math.ceil(apart / (asked * epoch))


def preview(model: UNet, diffusion: GaussianDiffusion, seed: int, device: torch.device) -> Tensor:
    """Sample by DDIM from the same noise each time, classes in turn: float32 (PREVIEW_IMAGES, C, H, W) in [-1, 1]."""
    noise = samplers.ImageNoise(seed, range(PREVIEW_IMAGES), model.config, device)
    path = samplers.timesteps(diffusion.timesteps, min(PREVIEW_STEPS, diffusion.timesteps), "trailing")
    labels = torch.arange(PREVIEW_IMAGES, device=device) % classes if (classes := model.config.classes) else None
    *_, last = samplers.ddim(samplers.conditioned(model, labels), diffusion, noise(), path, noise)
    return last.x


class Best(NamedTuple):
    """The least held-out loss so far: its step, its value, and the weights of the averages at that step."""

    step: int
    loss: float
    weights: dict[str, Tensor]


class Clock:
    """The times of a training, in seconds."""

    def __init__(self) -> None:
        self._began = self._saved_at = self._logged_at = time.monotonic()
        self.busy = 0.0  # inside forward, backward and step
        self.save_cost = 0.0  # how long the last save took

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the time of the block as busy."""
        before = time.monotonic()
        yield
        self.busy += time.monotonic() - before

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure the save in the block."""
        before = time.monotonic()
        yield
        self._saved_at = time.monotonic()
        self.save_cost = self._saved_at - before

    def since_log(self) -> float:
        """Seconds since the last call, or since the start."""
        before, self._logged_at = self._logged_at, time.monotonic()
        return self._logged_at - before

    def since_save(self) -> float:
        """Seconds since the last save."""
        return time.monotonic() - self._saved_at

    def wall(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began


class Training:
    """A training that can stop after any step: the run that resumes it ends in the same bytes as one never stopped.

    Args:
        setup: the network, its optimizer and what else `set_up` has built.
        train: the parameters of the loop.
        images: the training split; its labels are used where the network is class-conditional.
        held_out: the test split, used only for the held-out loss.
        state: holds the state of an earlier run, if there was one; pictures are saved in its folder.
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
        self.step = self.start = 0  # steps done in all, and by an earlier run
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
            UserError: a transform fails, a loader worker dies, memory runs out, or the training diverges.
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
        """Restore the saved state, if there is one, and record the curves up to its step again."""
        if (saved := self.state.load()) is not None:
            self.step = self.start = saved["step"]
            self.history = saved["history"]
            self.window.refill(saved["window"])
            self.best = saved["best"] and Best(*saved["best"])
            for name, part in self.parts.items():
                if saved[name]:  # empty where `precision: auto` took one without a scaler, on another GPU
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
        """A bar over the images of all steps, those of an earlier run included."""
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
        """Whether a point of the curves is due: every log_every_steps steps, and at the end."""
        return self.step % self.train.log_every_steps == 0 or self.step == self.setup.total

    def log_curve(self, bar: Progress) -> None:
        """Record the means since the last point, the images per second, and the peak memory.

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
        """The scale of the loss after the last step; nothing in other precisions than fp16.

        Raises:
            UserError: the scale has fallen below 1, so it is not the scale that makes the gradients overflow.
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
        """Whether a held-out loss is due: as for `at_preview`, and at the end; in the first process alone."""
        due = self._ends_epoch(self.held_out_every) or self.step == self.setup.total
        return due and processes.rank() == 0

    def log_held_out(self) -> None:
        """Record the held-out loss of the first average; where train.keep is best, copy the averages of the least."""
        losses = self.held_out(self.averages[0].model)
        self.history.append((self.step, losses))
        self.tracker.log(self.step, losses)
        loss = losses["held_out_loss"]
        if self.train.keep == "best" and (self.best is None or loss < self.best.loss):
            weights = {name: value.clone() for name, value in self.parts["averages"].state_dict().items()}
            self.best = Best(self.step, loss, weights)

    def at_preview(self) -> bool:
        """Whether a preview is due: at ends of epochs, as `epochs_between` says; in the first process alone."""
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
        """Whether a save is due: every save_every_seconds seconds and at ends of epochs; in the first process alone.

        An end of an epoch is passed over where saving would take more than 1 % of the time.
        """
        wait = self.train.save_every_seconds
        if self.step % self.setup.per_epoch == 0:
            wait = min(wait, 100 * self.clock.save_cost)
        return self.clock.since_save() > wait and processes.rank() == 0

    def save(self) -> None:
        """Save all that a resumed run needs to end in the same bytes.

        Raises:
            UserError: a loss is not finite; the last good state is kept.
        """
        with self.clock.saving():
            progress = {"step": self.step, "history": self.history, "window": self.window.check(self.step - 1)}
            progress["best"] = self.best and tuple(self.best)
            self.state.save({name: part.state_dict() for name, part in self.parts.items()} | progress)

    def finish(self) -> dict[float, UNet]:
        """Print the cost of the training; return the averages at the step that train.keep asks for, by their widths."""
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
        """`epochs_between` for a setting of `train`; prints a line where that is more than the setting asks for."""
        p, epoch = self.train, self.setup.per_epoch * self.train.batch_size
        asked = getattr(p, setting)
        every = epochs_between(asked, evaluations, share, epoch, self.setup.total * p.batch_size)
        if every > asked:
            print(f"train.{setting} = {asked}: epochs are short, so it is raised to {every}")
        return every
