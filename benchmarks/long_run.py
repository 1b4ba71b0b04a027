"""The records of a long training: python -m benchmarks.long_run --folder F [--steps 800000] [--wandb offline]

The project's own loop with its own curves, tracker, pictures and resume state, around a tiny network that is not
computed: what is left is the bookkeeping. A line per eighth of the training, then the cost of resuming at the end.
"""

import argparse
import json
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import ours
from ddpm.data.prepared import Images
from ddpm.pictures import grid
from ddpm.runtime.progress import Progress
from ddpm.runtime.resume import ResumeState
from ddpm.runtime.tracking import Tracker
from ddpm.training.loop import PREVIEW_IMAGES, Training

PREVIEWS = 204


def size(*paths: Path) -> float:
    """Of the files at and below these paths, in MB."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


class Bookkeeping(Training):
    """A training whose network and images cost nothing; it stops after the last step's records."""

    def batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        batch = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
        for _ in range(self.start, self.setup.total):
            yield batch

    def optimizer_step(self, images: Tensor, labels: Tensor) -> None:
        self.window.add(self.values)
        self.step += 1

    def at_held_out_point(self) -> bool:
        return self.step % (self.setup.total // 250) == 0

    def log_held_out(self) -> None:
        losses = {"held_out_loss": 0.1234567} | {f"held_out_loss_{i}_of_4": 0.1234567 for i in range(1, 5)}
        self.history.append((self.step, losses))
        self.tracker.log(self.step, losses)

    def at_preview(self) -> bool:
        return self.step % (self.setup.total // PREVIEWS) == 0

    def log_preview(self) -> None:
        pixels = np.random.default_rng(self.step).integers(0, 256, (PREVIEW_IMAGES, 64, 64, 3), np.uint8)
        name = f"samples_epoch_{self.step:05d}"
        self.tracker.log_picture(self.step, name, grid(pixels), self.pictures)

    values = torch.tensor([0.1234567, 1.2345678])
    points_took = 0.0
    rows: list[dict[str, float]]

    def log_curve(self, bar: Progress) -> None:
        began = time.perf_counter()
        super().log_curve(bar)
        self.points_took += time.perf_counter() - began
        if self.step % (self.setup.total // 8) == 0:
            began = time.perf_counter()
            self.save()
            copied = time.perf_counter() - began
            self.state.saved()
            row = {"steps": self.step, "point, ms": 1000 * self.points_took * 8 * self.train.log_every_steps}
            row["point, ms"] /= self.setup.total
            row |= {"save, ms": 1000 * copied, "save to disk, ms": 1000 * (time.perf_counter() - began)}
            row |= {"state, MB": size(self.state.folder / "state.pt")}
            row |= {"TSVs, MB": size(Path("results/train/plots")), "pictures, MB": size(self.pictures)}
            row |= {"W&B, MB": size(Path("wandb"))}
            print(json.dumps({name: round(value, 2) for name, value in row.items()}), flush=True)
            self.points_took = 0.0


def training(p: Any, tracker: Tracker, state: ResumeState) -> Bookkeeping:
    """One over eight images of 8x8."""
    from ddpm.training.setup import Design, set_up

    network, diffusion = ours._network(p, 8, 1), ours._diffusion(p, torch.device("cpu"))
    setup = set_up(p, Design(network.config, diffusion.config, ()), torch.device("cpu"), 8)
    split = Images(np.zeros((8, 8, 8, 1), np.uint8), np.zeros(8, np.int64))
    return Bookkeeping(setup, p.train, split, split, tracker, state)


def main() -> None:
    """Run to the end, then resume from the last state."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_run", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the records are written")
    parser.add_argument("--steps", type=int, default=800_000)
    parser.add_argument("--wandb", choices=("disabled", "offline"), default="disabled")
    arguments = parser.parse_args()
    p = ours.params("model=small", "model.base_channels=8", "train.batch_size=1", f"train.steps={arguments.steps}")
    tracking = p.tracking.model_copy(update={"wandb": arguments.wandb})
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.folder)
    with ResumeState(Path("state")) as state:
        for what in ("run", "resumed"):
            began = time.perf_counter()
            with Tracker("results/train", tracking, {}, "long", "train") as tracker:
                opened = time.perf_counter()
                job = training(p, tracker, state)
                if what == "run":
                    job.run()
                else:
                    job.resume()
                    print(json.dumps({"replay, s": round(time.perf_counter() - opened, 1), "from step": job.step}))
                tracker.finish()
            print(json.dumps({what: f"{time.perf_counter() - began:.0f} s"}), flush=True)


if __name__ == "__main__":
    main()
