"""Measure the cost of an evaluation's distances: python -m benchmarks.distances [--seconds 30]

It calls the functions of the stage evaluate with random features in place of images. A loop over rows or tiles that
takes longer than the seconds is stopped there, and its time is that of what ran, in proportion. All tiles cost the
same, but for two things: an image ranks all that its first tiles hold, so that the estimate of a loop that is stopped
early is too long; and after a stopped loop over one set no ball holds an image, which saves the search for those that
do. The memory is that of a tile, and all are of one size.

Each cell is kept in benchmarks/results/distances.json as soon as it is done: a call that was cut continues, as long as
no commit has changed ddpm/evaluation.
"""

import argparse
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
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
Cell = tuple[str, int, int, int]
CELLS: list[Cell] = [(part, n, m, width) for width in WIDTHS for m in REAL for n in SAMPLES for part in PARTS]


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


def cell(send: Send, part: str, samples: str, real: str, limit: float) -> None:
    """One turn: the seconds and the peak of memory of a part, and the share of the seconds that ran."""
    import torch

    from ddpm.evaluation import blocks, distances, neighbours, pairs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a, b = (np.load(path, mmap_mode="r") for path in (samples, real))
    loops, balls = Loops(limit), pairs._sample_balls
    empty = partial(torch.zeros, dtype=torch.float64, device=device)
    for module in (blocks, distances):
        module.Progress = loops.bar  # type: ignore[attr-defined]

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
            return empty(keep.shape), empty(len(samples))

    def all_pairs() -> None:
        try:
            compared = pairs.real_pairs(b, 3, device)
        except Stopped:
            compared = pairs.Real(b, empty(len(b)), 0.0)
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


def code() -> str | None:
    """The commit that last changed ddpm/evaluation; None if it was changed since."""
    git = partial(subprocess.run, cwd=RESULTS.parent.parent, capture_output=True, text=True, check=True)
    if git(["git", "status", "--porcelain", "ddpm/evaluation"]).stdout:
        return None
    return git(["git", "log", "-1", "--format=%h", "--", "ddpm/evaluation"]).stdout.strip()


def kept() -> list[dict[str, Any]]:
    """The rows of the file that were measured with today's code."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))["rows"] if FILE.exists() else []
    commit = code()
    return [row for row in rows if commit and row.get("code") == commit]


def measure(cells: list[Cell], limit: float) -> Iterator[dict[str, Any]]:
    """A row for each cell; the features are made once for all parts that take them."""
    commit = code()
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, f"{name}.npy") for name in ("samples", "real")}
        made: dict[Path, tuple[int, int]] = {}
        for part, n, m, width in cells:
            for seed, (path, count) in enumerate(zip(paths.values(), (n, m), strict=True)):
                if made.get(path) != (count, width):
                    features(path, count, width, seed)
                    made[path] = (count, width)
            settings = {"part": part, "limit": limit} | {name: str(path) for name, path in paths.items()}
            with Worker(Contender("cell", "benchmarks.distances:cell", settings)) as worker:
                yield {"part": part, "samples": n, "real": m, "width": width, "code": commit} | worker.ask()


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell that a row measured."""
    return row["part"], row["samples"], row["real"], row["width"]


def duration(seconds: float) -> str:
    """The seconds in a unit that suits them."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def page(rows: list[dict[str, Any]]) -> str:
    """The tables, in markdown."""
    found = {cell_of(row): row for row in rows}

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
    """Measure the cells that are not in the file yet, write the numbers after each, print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distances", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30, help="per loop")
    parser.add_argument("--again", action="store_true", help="repeat the cells that are in the file")
    arguments = parser.parse_args()
    rows = [] if arguments.again else kept()
    done = {cell_of(row) for row in rows}
    for row in measure([cell for cell in CELLS if cell not in done], arguments.seconds):
        rows.append(row)
        print(row, flush=True)
        FILE.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(page(rows))


if __name__ == "__main__":
    main()
