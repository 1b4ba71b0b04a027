"""A training of a few steps of a small network on random images, by the real loop and the real tracker."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ddpm.config.load import check
from ddpm.config.schema import Tracking
from ddpm.core.diffusion import DiffusionConfig
from ddpm.core.unet import UNet
from ddpm.data.prepared import Images
from ddpm.runtime.resume import ResumeState
from ddpm.runtime.tracking import Tracker
from ddpm.training.loop import Training
from ddpm.training.setup import Design, set_up
from tests.conftest import composed, small_unet

SHALLOW: dict[str, Any] = {"block_out_channels": (16,), "attention": (True,)}  # two thirds of the time
TINY: dict[str, Any] = {"block_out_channels": (8,), "attention": (False,)}  # a third of it, and it still learns
TWO_CLASSES: dict[str, Any] = {"num_class_embeds": 3, "has_no_label": True}
NAMES = ("dark", "bright")
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)


class Curves(Tracker):
    """The real tracker without W&B, which also keeps its records; it sends SIGTERM after the step `stop_at`."""

    def __init__(self, folder: Path, stop_at: int | None = None) -> None:
        super().__init__(str(folder), Tracking(wandb="disabled", project="test"), {}, "run", "train")
        self.logged: dict[int, dict[str, float]] = {}
        self.pictures: list[str] = []
        self.stop_at = stop_at

    def log(self, step: int, metrics: dict[str, float], machine: dict[str, float] | None = None) -> None:
        super().log(step, metrics, machine)
        self.logged[step] = self.logged.get(step, {}) | metrics
        if step == self.stop_at and machine is not None:
            os.kill(os.getpid(), signal.SIGTERM)

    def log_picture(self, step: int, name: str, picture: Image.Image, folder: Path | None = None) -> None:
        super().log_picture(step, name, picture, folder)
        self.pictures.append(name)
        if step and step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


def train(folder: Path, *overrides: str, **options: Any) -> tuple[UNet, Curves]:
    """Like `train_all`: the first average, and the records."""
    averages, tracker = train_all(folder, *overrides, **options)
    return next(iter(averages.values())), tracker


def train_all(
    folder: Path,
    *overrides: str,
    images: np.ndarray = IMAGES,
    device: str = "cpu",
    stop_at: int | None = None,
    name: str = "run",
    network: dict[str, Any] | None = None,
    learn_variance: bool = False,
    held_out_images: np.ndarray | None = None,
) -> tuple[dict[float, UNet], Curves]:
    """Train 12 steps, or as the overrides say: the averages by their widths, and the records.

    Args:
        folder: holds the curves in the folder `name`, the state in state-`name`.
        stop_at: the step after whose record SIGTERM is sent.
        network: changes to `small_unet`.
        held_out_images: None: `images`.
    """
    params = check(
        composed(
            "train.steps=12",
            "train.batch_size=8",
            "train.log_every_steps=3",
            "train.preview_every_epochs=0",
            "train.warmup_steps=3",
            *overrides,
        )
    )
    config = small_unet(**{"dropout": 0.1} | (network or {})).config
    diffusion = DiffusionConfig(50, "cosine", "v", learn_variance=learn_variance)
    design = Design(config, diffusion, NAMES[: config.classes])
    setup = set_up(params, design, torch.device(device), len(images))
    tracker = Curves(folder / name, stop_at)
    with ResumeState(folder / f"state-{name}") as state:
        splits = split_of(images), split_of(images if held_out_images is None else held_out_images)
        averages = Training(setup, params.train, *splits, tracker, state).run()
    return averages, tracker


def split_of(images: np.ndarray) -> Images:
    """A split of two classes that alternate."""
    return Images(images, np.arange(len(images)) % 2)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have the same weights, to the bit."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
