"""How good the samples are after so many CPU-seconds of training on one core: a race, here on the digits.

CPU time, since other work on the machine changes the seconds on the clock more.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks import ours
from benchmarks.report import curves, table
from benchmarks.workers import Contender, Worker
from tools.common.statistics import number

TITLE = "Quality by training time"
OURS = "ours"
COUNT = 2000  # samples per training
CHOOSING = 0  # the seed on which a contender's settings are chosen: no result is from it
PROBE = 30  # steps that show the pace of a training, where no earlier training did
CLOSE, TRIES = 0.1, 3  # a training may miss the seconds asked for by this share, and is made at most so many times
RATES = {f"learning rate {rate:g}": {"rate": rate} for rate in (3e-4, 1e-3, 3e-3)}  # both peers' default is 1e-4
DIFFUSERS = {  # as large as ours
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}
DDPM_PYTORCH = {
    f"{width} channels, {rate}": {"network": {"dim": width, "dim_mults": (1, 2), "channels": 1}} | RATES[rate]
    for width, rate in [*((32, rate) for rate in RATES), (64, "learning rate 0.001")]
}

Row = dict[str, Any]  # name, choice, seed, goal (the CPU-seconds asked for), steps, seconds (CPU), distance


@dataclass(frozen=True)
class Entry:
    """A contender: its function, and by name the settings of which the best one races."""

    name: str
    function: str
    choices: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Data:
    """What is learned, and how samples of it are judged.

    Attributes:
        images: the file of the training images, uint8 (N, H, W, C).
        count: samples per training.
        real: features of the real images, (M, ...).
        features: of images.
    """

    images: Path
    count: int
    real: np.ndarray
    features: Callable[[np.ndarray], np.ndarray] = lambda images: images

    def distance(self, samples: np.ndarray) -> float:
        """The Fréchet distance of images from the real ones."""
        return ours.distance(self.features(samples), self.real)


def digits(folder: Path, count: int) -> Data:
    """The digits: trained on the training images, judged in pixel space by all. `folder` holds the prepared data."""
    prepared = ours.prepared(folder, "dataset=digits")
    real = np.concatenate([prepared.train.images, prepared.test.images])
    return Data(folder / "prepared/train/images.npy", count, real)


def mine(*overrides: str) -> Entry:
    """This project with some changed parameters."""
    settings = {"overrides": [*overrides, "runtime.reproducible=false", "runtime.threads=1"]}
    return Entry(OURS, "benchmarks.ours:quality", {"default": settings})


def peers(diffusers: dict[str, Any], ddpm_pytorch: dict[str, dict[str, Any]]) -> list[Entry]:
    """The peers: diffusers with a network and each learning rate, the other with its choices."""
    rates = {name: {"network": diffusers} | rate for name, rate in RATES.items()}
    return [
        Entry("diffusers, recipe of its example", "benchmarks.peers:diffusers_quality", rates),
        Entry("denoising-diffusion-pytorch", "benchmarks.peers:ddpm_pytorch_quality", ddpm_pytorch),
    ]


def trained(
    entry: Entry, choice: str, seed: int, data: Data, plan: Callable[[Callable[[int], float]], tuple[int, float]]
) -> Row:
    """Train in a new process of one thread, draw samples, judge them.

    Args:
        plan: returns steps and CPU-seconds of the training whose samples count, which is the last that it made by the
            function that it is given: from steps to CPU-seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/samples.npy"
        settings = {"images": str(data.images), "count": data.count, "seed": seed, "out": out} | entry.choices[choice]
        with Worker(Contender(entry.name, entry.function, settings, {"OMP_NUM_THREADS": "1"})) as worker:
            steps, seconds = plan(worker.ask)
            worker.ask()
        row = {"name": entry.name, "choice": choice, "seed": seed, "steps": steps, "seconds": seconds}
        return row | {"distance": data.distance(np.load(out))}


def fill(train: Callable[[int], float], goal: float, pace: float | None) -> tuple[int, float]:
    """Train for about `goal` CPU-seconds: the steps and the CPU-seconds that they took.

    A learning rate that falls to zero at the end has to know the number of its steps: it follows from the pace (seconds
    per step) of the training before. Where that was not the pace of this one, it is made again.
    """
    pace = pace or train(PROBE) / PROBE
    for _ in range(TRIES):
        steps = max(1, round(goal / pace))
        seconds = train(steps)
        if abs(seconds - goal) < CLOSE * goal:
            break
        pace = seconds / steps
    return steps, seconds


@dataclass
class Race:
    """Trainings and their distances. A training that is among the rows is not made again.

    Attributes:
        keep: called after each new row.
    """

    data: Data
    rows: list[Row] = field(default_factory=list)
    keep: Callable[[], object] = lambda: None

    def run(self, entries: Sequence[Entry], seeds: Sequence[int], goals: Sequence[float], choosing: float) -> None:
        """Choose each contender's settings after `choosing` CPU-seconds, then let the contenders take turns."""
        for entry in entries:
            known = {row["choice"] for row in tried(self.rows, entry.name)}
            for choice in [c for c in entry.choices if c not in known and len(entry.choices) > 1]:
                self.add(entry, choice, CHOOSING, choosing)
        finished = {(row["name"], row["seed"], row["goal"]) for row in self.rows}
        for seed, goal, entry in product(seeds, goals, entries):
            if (entry.name, seed, goal) not in finished:
                rows = tried(self.rows, entry.name)
                choice = min(rows, key=itemgetter("distance"))["choice"] if rows else next(iter(entry.choices))
                self.add(entry, choice, seed, goal)

    def add(self, entry: Entry, choice: str, seed: int, goal: float) -> None:
        """Train one at the pace of the last one of these settings; choices are judged by a quarter of the samples."""
        paces = [r["seconds"] / r["steps"] for r in self.rows if (r["name"], r["choice"]) == (entry.name, choice)]
        data = replace(self.data, count=self.data.count // 4) if seed == CHOOSING else self.data
        row = trained(entry, choice, seed, data, lambda train: fill(train, goal, paces[-1] if paces else None))
        self.rows.append(row | {"goal": goal})
        print(f"  {self.rows[-1]}", flush=True)
        self.keep()


def tried(rows: list[Row], name: str) -> list[Row]:
    """The rows from which the settings of a contender are chosen."""
    return [row for row in rows if row["name"] == name and row["seed"] == CHOOSING]


def measure(quick: bool, compiled: bool) -> dict[str, Any]:
    """Each contender on the digits, at each moment, with each seed."""
    goals, seeds, count = ([1, 2], [1], 40) if quick else ([30, 60, 120], [1, 2, 3], COUNT)
    with tempfile.TemporaryDirectory() as folder:
        race = Race(digits(Path(folder), count))
        race.run([mine(), *peers(DIFFUSERS, DDPM_PYTORCH)], seeds, goals, goals[1])
    return {"count": count, "reference": len(race.data.real), "rows": race.rows}


def standings(rows: list[Row], unit: float = 1, units: str = "s") -> str:
    """The tables of a race; `unit` is that of the moments, in seconds."""
    results = [row for row in rows if row["seed"] != CHOOSING]
    goals, names = (sorted({row["goal"] for row in results}), list(dict.fromkeys(row["name"] for row in results)))
    found = {(n, g): [r for r in results if (r["name"], r["goal"]) == (n, g)] for n in names for g in goals}

    def cell(runs: list[Row]) -> str:
        if not runs:
            return "–"
        steps, seconds = (fmean(run[what] for run in runs) for what in ("steps", "seconds"))
        distance = number([run["distance"] for run in runs])
        return f"{distance} ({steps:,.0f} steps, {seconds / unit:.3g} {units})"

    def ratio(goal: float) -> str:
        means = {name: fmean(r["distance"] for r in runs) for name in names if (runs := found[name, goal])}
        mine, peers = means.pop(OURS, None), means.values()
        return f"{mine / min(peers):.2f}" if mine is not None and peers else "–"

    lines = [(name, *(cell(found[name, goal]) for goal in goals)) for name in names]
    lines.append(("ours by the better peer's", *map(ratio, goals)))
    choices = [
        (row["name"], row["choice"], f"{row['seconds'] / unit:.3g} {units}", f"{row['distance']:.4g}")
        for row in rows
        if row["seed"] == CHOOSING
    ]
    return (
        table(("contender", *(f"after {goal / unit:g} {units}" for goal in goals)), lines)
        + "\nEach peer has the setting that was the best by a quarter of the samples, on a seed that is not in the "
        + "table above; diffusers warms up in a tenth of its steps:\n\n"
        + table(("peer", "setting", "after", "Fréchet distance"), choices)
    )


def page(result: dict[str, Any]) -> str:
    """The tables."""
    return (
        f"Fréchet distance in pixel space of {result['count']:,} samples from all {result['reference']:,} digits, "
        f"after training on the same images in memory by one thread for so many CPU-seconds: mean ± standard error of "
        f"the seeds. Each moment is a training of its own, and sampling is not counted. Ours is the default, with "
        f"`runtime.reproducible=false`, a tenth of the steps to warm up and no previews; the peers sample by DDIM in "
        f"50 steps.\n\n{standings(result['rows'])}"
    )


def chart(result: dict[str, Any]) -> dict[str, Any]:
    """Distance by seconds."""
    results = [row for row in result["rows"] if row["seed"] != CHOOSING]
    places = sorted({(row["name"], row["goal"]) for row in results})
    rows = []
    for name, goal in places:
        runs = [row for row in results if (row["name"], row["goal"]) == (name, goal)]
        x, y = (fmean(run[what] for run in runs) for what in ("seconds", "distance"))
        rows.append({"name": name, "x": x, "y": y})
    return curves("CPU-seconds of training", "Fréchet distance", rows)
