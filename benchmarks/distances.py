"""Measure the cost of an evaluation's distances: python -m benchmarks.distances [--seconds 30]

It calls the functions of the stage evaluate with random features in place of images. A loop over rows that takes longer
than the seconds is stopped there, and its time is that of the rows that ran, in proportion: all rows cost the same. Its
memory is that of its blocks, which are all of one size.
"""

import argparse
import json
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.report import RESULTS
from benchmarks.workers import Contender, Send, Worker
from ddpm.runtime.progress import Progress

SAMPLES, REAL, WIDTHS = (10_000, 50_000), (10_000, 100_000, 1_000_000), (64, 768, 2048, 3072)
PARTS = {
    "fréchet": "Fréchet distance with its error, from the features",
    "pairs": "KID, precision, recall, density, coverage, with errors",
    "nearest": "Nearest training images",
}
FILE = RESULTS / "distances.json"
CELLS = [(part, n, m, width) for width in WIDTHS for m in REAL for n in SAMPLES for part in PARTS]


def features(path: Path, count: int, width: int, seed: int) -> None:
    """A file of normal features, float32 (N, D), whose directions differ in their spread."""
    array = np.lib.format.open_memmap(path, "w+", np.float32, (count, width))
    rng = np.random.default_rng(seed)
    for start in range(0, count, 10_000):
        part = array[start : start + 10_000]
        part[:] = rng.standard_normal(part.shape, np.float32) * np.arange(1, width + 1, dtype=np.float32) ** -0.5


class Peak(threading.Thread):
    """The peak memory of this process, without the pages of mapped files: sampled 50 times per second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib, self._done = 0.0, threading.Event()
        self.look()
        self.start()

    def look(self) -> None:
        """Sample once."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.mib = max(self.mib, int(status["RssAnon"].split()[0]) / 1024)

    def run(self) -> None:
        """Sample until `stop`."""
        while not self._done.wait(0.02):
            self.look()

    def stop(self) -> float:
        """Stop, and return the peak in MiB."""
        self._done.set()
        self.join()
        return self.mib


class Stopped(Exception):  # noqa: N818  it is no error
    """A loop took longer than its seconds."""


class Loops:
    """The loops of a cell, each stopped after `limit` seconds; `rest` is the seconds of what is left out."""

    def __init__(self, limit: float) -> None:
        self.limit, self.rest = limit, 0.0

    def check(self, start: float, share: float) -> None:
        """Stop the loop that began at `start`, if its seconds have passed; `share` of it is done."""
        passed = time.perf_counter() - start
        if passed > self.limit and share < 1:
            self.rest += passed * (1 / share - 1)
            raise Stopped

    def bar(self, total: int, name: str, unit: str) -> Progress:
        """A bar that stops its loop."""
        loops, start = self, time.perf_counter()

        class Bar(Progress):
            def update(self, n: float | None = 1) -> bool | None:
                shown = super().update(n)
                loops.check(start, self.n / total)
                return shown

        return Bar(total, name, unit)

    def counted(self, function: Callable[..., Any], total: int) -> Callable[..., Any]:
        """A function that is called so many times in a loop, and stops it."""
        starts: list[float] = []

        def call(*given: Any) -> Any:
            starts.append(time.perf_counter())
            self.check(starts[0], (len(starts) - 1) / total or 1)
            return function(*given)

        return call


def cell(send: Send, part: str, samples: str, real: str, limit: float) -> None:
    """One turn: the seconds and the peak of memory of a part, and the share of the seconds that ran."""
    import torch

    from ddpm.evaluation import distances, neighbours, pairs
    from ddpm.evaluation.blocks import row_blocks

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a, b = (np.load(path, mmap_mode="r") for path in (samples, real))
    loops, balls = Loops(limit), pairs._sample_balls
    for module in (distances, pairs):
        module.Progress = loops.bar  # type: ignore[attr-defined]
    blocks = [len(list(row_blocks(a, min(len(b), neighbours.POINTS)))), math.ceil(len(b) / neighbours.POINTS)]
    neighbours.products = loops.counted(neighbours.products, math.prod(blocks))

    def normal(features: np.ndarray) -> distances.Normal:
        try:
            return distances.Normal(features, device, "features")
        except Stopped:  # the rest of the work is that of all features
            fitted = distances.Normal(features[: 2 * features.shape[1]], device)
            fitted.features = features
            return fitted

    def some_balls(samples: np.ndarray, neighbours: int, keep: Any, device: Any) -> Any:
        try:
            return balls(samples, neighbours, keep, device)
        except Stopped:
            return torch.zeros(keep.shape, dtype=torch.float64), torch.zeros(len(samples), dtype=torch.float64)

    def all_pairs() -> None:
        try:
            compared = pairs.real_pairs(b, 3, device)
        except Stopped:  # empty balls cost as much as any
            compared = pairs.Real(b, torch.zeros(len(b), dtype=torch.float64), 0.0)
        pairs.compare(a, compared, 3, 0, device)

    pairs._sample_balls = some_balls
    work: dict[str, Callable[[], object]] = {
        "fréchet": lambda: distances.frechet_distance(normal(a), normal(b)),
        "pairs": all_pairs,
        "nearest": lambda: neighbours.nearest(a, b, device),
    }
    send("ready")
    peak, start = Peak(), time.perf_counter()
    with suppress(Stopped):
        work[part]()
    if device.type == "cuda":
        torch.cuda.synchronize()
    ran, mib = time.perf_counter() - start, peak.stop()
    seconds = ran + loops.rest
    send({"seconds": seconds, "ran": ran / seconds, "mib": max(mib, torch.cuda.max_memory_allocated() / 2**20)})


def measure(limit: float) -> Iterator[dict[str, Any]]:
    """A row for each cell; the features are made once for all parts that take them."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, f"{name}.npy") for name in ("samples", "real")}
        made: dict[Path, tuple[int, int]] = {}
        for part, n, m, width in CELLS:
            for seed, (path, count) in enumerate(zip(paths.values(), (n, m), strict=True)):
                if made.get(path) != (count, width):
                    features(path, count, width, seed)
                    made[path] = (count, width)
            settings = {"part": part, "limit": limit} | {name: str(path) for name, path in paths.items()}
            with Worker(Contender("cell", "benchmarks.distances:cell", settings)) as worker:
                yield {"part": part, "samples": n, "real": m, "width": width} | worker.ask()


def duration(seconds: float) -> str:
    """The seconds in a unit that suits them."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def page(rows: list[dict[str, Any]]) -> str:
    """The tables, in markdown."""
    found = {(row["part"], row["samples"], row["real"], row["width"]): row for row in rows}

    def text(row: dict[str, Any]) -> str:
        return f"{'≈ ' if row['ran'] < 1 else ''}{duration(row['seconds'])}, {row['mib']:,.0f} MiB"

    lines = []
    for part, what in PARTS.items():
        lines += [f"{what}:", "", f"| samples | real images | {' | '.join(f'{width:,}' for width in WIDTHS)} |"]
        lines += ["| --- " * (2 + len(WIDTHS)) + "|"]
        for n in SAMPLES:
            for m in REAL:
                costs = [text(found[part, n, m, width]) for width in WIDTHS]
                lines.append(f"| {n:,} | {m:,} | {' | '.join(costs)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the numbers after each cell, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30)
    rows = []
    for row in measure(parser.parse_args().seconds):
        rows.append(row)
        print(row, flush=True)
        FILE.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(page(rows))


if __name__ == "__main__":
    main()
