"""A large set beside a small one: startup, memory, speed of training and evaluation. It takes 12 GB for a million.

    python -m benchmarks.million --folder /tmp/million              # 1,000,000 images of 64x64x3, beside 10,000
    python -m benchmarks.million --folder /tmp/files --files 100000 # the stage prepare_data, on so many JPEG files

The data is made where it is not there yet. Delete the folder afterwards.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from benchmarks import ours
from benchmarks.report import table
from benchmarks.workers import Contender, alternate

ROOT = Path(__file__).parents[1]
SIZE, BLOCK, HELD_OUT = 64, 2_000, 10_000
STARTS, TURNS, TURN_STEPS = 3, 8, 6
TINY = [  # so small that reading the images is a part of the time that would be seen
    "dataset=folder",
    "dataset.image_size=64",
    "model.base_channels=8",
    "model.channel_multipliers=[1,1,1,1]",
    "model.attention=[false,false,false,false]",
    "train.batch_size=16",
    "runtime.threads=1",
    "train.preview_every_epochs=0",
    "train.held_out_every_epochs=1000",
    "sample.count=512",
    "sample.steps=2",
]
EXTRACTOR = [
    "evaluate=dinov2",
    "evaluate.features=timm:test_vit",
    "evaluate.input_size=64",
    "evaluate.reference_images=10000",
    "evaluate.loss_images=500",
]


def make(folder: Path, count: int) -> None:
    """Prepared data of `count` random training images and HELD_OUT others, where there is none."""
    if (prepared := folder / "data/prepared").exists():
        return
    counts, content, rng = {"train": count, "test": HELD_OUT}, hashlib.sha256(), np.random.default_rng(0)
    for split, n in counts.items():
        (prepared / split).mkdir(parents=True)
        images = np.lib.format.open_memmap(prepared / split / "images.npy", "w+", np.uint8, (n, SIZE, SIZE, 3))
        for start in range(0, n, BLOCK):
            images[start : start + BLOCK] = rng.integers(0, 256, images[start : start + BLOCK].shape, np.uint8)
            content.update(images[start : start + BLOCK].data)
        images.flush()
        np.save(prepared / split / "labels.npy", labels := np.zeros(n, np.int64))
        content.update(labels.data)
    info = {"name": "random", "shape": [SIZE, SIZE, 3], "counts": counts, "classes": [], "class_counts": []}
    (prepared / "dataset.json").write_text(json.dumps(info | {"broken": 0, "sha256": content.hexdigest()}))


def settings(folder: Path) -> list[str]:
    """TINY, with an extractor of random weights."""
    if not (path := folder / "weights.safetensors").exists():
        import timm
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(0)
        save_file(timm.create_model("test_vit", pretrained=False).state_dict(), path)
    return [*TINY, *EXTRACTOR, f"evaluate.weights={path}"]


class Stage:
    """A stage in a folder, in a process of its own.

    Attributes:
        out: what it has printed.
        anonymous: the most memory of the process and of those it started, in MiB, without the pages of files.
    """

    def __init__(self, folder: Path, stage: str, *overrides: str) -> None:
        (folder / "params.yaml").write_text(OmegaConf.to_yaml(ours.composed(*overrides)))
        env = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "DVC_ROOT": str(folder)}
        self.out, self.anonymous, self._began = "", 0.0, time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"stages.{stage}"],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        import psutil

        while self._process.poll() is None:
            total = 0
            try:
                this = psutil.Process(self._process.pid)
                for process in (this, *this.children(recursive=True)):
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    total += int(status.partition("RssAnon:")[2].split()[0])
            except (OSError, IndexError, psutil.NoSuchProcess):
                continue
            self.anonymous = max(self.anonymous, total / 1024)
            time.sleep(0.1)

    def until(self, text: str) -> "Stage":
        """Read what it prints until a line with `text`."""
        assert self._process.stdout
        for line in self._process.stdout:
            self.out += line
            if text in line:
                return self
        raise RuntimeError(f"ended with {self._process.wait()}:\n{self.out[-3000:]}")

    def stop(self) -> None:
        """Send SIGTERM, and wait."""
        self._process.send_signal(signal.SIGTERM)
        self.out += self._process.communicate()[0]

    def end(self) -> dict[str, float]:
        """Wait for its end: seconds and memory."""
        self.out += self._process.communicate()[0]
        if self._process.returncode:
            raise RuntimeError(self.out[-3000:])
        return {"seconds": time.perf_counter() - self._began, "anonymous MiB": self.anonymous}


def first_step(folder: Path, seed: int) -> dict[str, float]:
    """Start a training, let it run for some seconds, and stop it: seconds to the first step, memory."""
    stage = Stage(folder, "train", *settings(folder), f"train.seed={seed}", "train.steps=100000")
    seconds = float(stage.until("first step after").out.rpartition("first step after ")[2].split()[0])
    time.sleep(5)
    stage.stop()
    return {"first step, s": seconds, "anonymous MiB": stage.anonymous}


def measure(folders: dict[str, Path]) -> dict[str, dict[str, dict[str, float]]]:
    """The cost of each start and of an evaluation, the sets in turns; of several starts the median."""
    for folder, kept in product(folders.values(), (".cache", ".state")):
        shutil.rmtree(folder / kept, ignore_errors=True)
    turns: list[dict[str, dict[str, dict[str, float]]]] = [{} for _ in range(STARTS)]
    for seed, turn in enumerate(turns):
        for name, folder in folders.items():
            turn[name] = {"train, first start: all is read": first_step(folder, 0)} if seed == 0 else {}
            turn[name] |= {"train, next start": first_step(folder, 1 + seed)}
            turn[name] |= {"train, resumed": first_step(folder, 1 + seed)}
    found = {
        name: {
            what: {cost: statistics.median(turn[name].get(what, costs)[cost] for turn in turns) for cost in costs}
            for what, costs in turns[0][name].items()
        }
        for name in folders
    }
    for name, folder in folders.items():
        short = ("train.steps=2", "train.warmup_steps=1", "train.log_every_steps=2")
        Stage(folder, "train", *settings(folder), *short).end()
        Stage(folder, "sample", *settings(folder), *short).end()
        found[name]["evaluate"] = Stage(folder, "evaluate", *settings(folder), *short).end()
    return found


def _compared(answers: dict[str, list[dict[str, float]]], what: str) -> dict[str, float]:
    small, large = ([turn["seconds"] for turn in turns] for turns in answers.values())
    return {
        f"small, ms per {what}": 1000 * statistics.median(small),
        f"large, ms per {what}": 1000 * statistics.median(large),
        "ratio": statistics.median(b / a for a, b in zip(small, large, strict=True)),
    }


def reading(folders: dict[str, Path]) -> dict[str, float]:
    """As `ratios`, of a batch of 64 images alone, without a network, in seconds of the CPU."""
    import torch

    torch.set_num_threads(1)
    streams = {name: ours.batches_of(folder / "data/prepared/train/images.npy", 64) for name, folder in folders.items()}
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    for _, (name, stream) in product(range(2 * TURNS), streams.items()):
        before = time.process_time()
        for _ in range(50):
            next(stream)
        answers[name].append({"seconds": (time.process_time() - before) / 50})
    return _compared(answers, "batch")


def ratios(folders: dict[str, Path]) -> dict[str, float]:
    """Seconds per step of each, in turns of one run; the median of the ratios to the small set in the same turn."""
    common = {"steps": TURN_STEPS, "overrides": TINY}
    contenders = [
        Contender(name, "benchmarks.ours:stored", common | {"folder": str(folder)}) for name, folder in folders.items()
    ]
    answers = alternate(contenders, [None] * TURNS)
    return _compared(answers, "step")


def _write_jpegs(folder: Path, first: int, last: int) -> None:
    for i in range(first, last):
        rng = np.random.default_rng(i)
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((SIZE, SIZE))
        picture.save(folder / f"{i // 1000:04d}" / f"{i:07d}.jpg", quality=75)


def make_files(folder: Path, count: int) -> None:
    """So many JPEG files, a thousand in each folder, where there are none; the folders are their classes."""
    if (raw := folder / "data/raw").exists():
        return
    for start in range(0, count, 1000):
        (raw / f"{start // 1000:04d}").mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        for start in range(0, count, 1000):
            pool.submit(_write_jpegs, raw, start, min(start + 1000, count))


def main() -> None:
    """Make what is asked for, measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.million", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the data is made")
    parser.add_argument("--count", type=int, default=1_000_000, help="images of the large set")
    parser.add_argument("--small", type=int, default=10_000, help="images of the small set")
    parser.add_argument("--files", type=int, help="measure prepare_data on so many image files instead")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if arguments.files:
        make_files(folder, arguments.files)
        print(json.dumps({"files": arguments.files} | Stage(folder, "prepare_data", *settings(folder)).end()))
        return
    folders = {"small": folder / "small", "large": folder / "large"}
    for place, count in zip(folders.values(), (arguments.small, arguments.count), strict=True):
        make(place, count)
    found = measure(folders)
    cells = [
        (what, cost, *(f"{found[name][what][cost]:,.1f}" for name in folders))
        for what, costs in found["small"].items()
        for cost in costs
    ]
    print(table(("", "", f"{arguments.small:,}", f"{arguments.count:,}"), cells))
    print(json.dumps(ratios(folders)))
    print(json.dumps(reading(folders)))


if __name__ == "__main__":
    main()
