"""Measure the cost of an evaluation's distances: python -m benchmarks.distances [--minutes 30]

It calls the functions of the stage evaluate with random features in place of images. The cells run from the cheapest up
until the minutes are used. The other cells get an estimate, marked as one: their number of operations at the rate of
the largest cell of their part that ran.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.report import RESULTS
from benchmarks.workers import Contender, Send, Worker

SAMPLES, REAL, WIDTHS = (10_000, 50_000), (10_000, 100_000, 1_000_000), (64, 768, 2048, 3072)
PARTS = {
    "fréchet": "Fréchet distance with its error, from the features",
    "pairs": "KID, precision, recall, density, coverage, with errors",
    "nearest": "Nearest training images",
}
FILE = RESULTS / "distances.json"
CPU_RATE = 4e10  # operations per second, about, to decide which cells fit the minutes


def operations(part: str, samples: int, real: int, width: int) -> float:
    """The operations of a cell, roughly."""
    if part == "fréchet":
        return 2.0 * (2 * samples + real) * width**2 + 120 * width**3
    if part == "pairs":
        return (2.0 * width + 100) * (samples**2 + real**2) + (2 * width + 500) * samples * real
    return (2.0 * width + 50) * samples * real


def cells() -> Iterator[tuple[str, int, int, int]]:
    """All cells, the cheapest first."""
    every = [(part, n, m, width) for part in PARTS for n in SAMPLES for m in REAL for width in WIDTHS]
    return iter(sorted(every, key=lambda cell: operations(*cell)))


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


def cell(send: Send, part: str, samples: str, real: str) -> None:
    """One turn: the seconds and the peak of memory of a part."""
    import torch

    from ddpm.evaluation import distances, neighbours, pairs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a, b = (np.load(path, mmap_mode="r") for path in (samples, real))
    work: dict[str, Callable[[], object]] = {
        "fréchet": lambda: distances.frechet_distance(distances.Normal(a, device), distances.Normal(b, device)),
        "pairs": lambda: pairs.compare(a, pairs.real_pairs(b, 3, device), 3, 0, device),
        "nearest": lambda: neighbours.nearest(a, b, device),
    }
    send("ready")
    peak, start = Peak(), time.perf_counter()
    work[part]()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, mib = time.perf_counter() - start, peak.stop()
    send({"seconds": seconds, "mib": max(mib, torch.cuda.max_memory_allocated() / 2**20)})


def measure(minutes: float, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each cell; without a cost where the minutes were used up. `known` holds rows of an earlier call."""
    rows, end = [], time.monotonic() + 60 * minutes
    finished = {(row["part"], row["samples"], row["real"], row["width"]): row for row in known if "mib" in row}
    with tempfile.TemporaryDirectory() as folder:
        for part, n, m, width in cells():
            row: dict[str, Any] = {"part": part, "samples": n, "real": m, "width": width}
            rows.append(row := finished.get((part, n, m, width), row))
            if "mib" in row or time.monotonic() + operations(part, n, m, width) / CPU_RATE > end:
                continue
            paths = {name: Path(folder, f"{name}.npy") for name in ("samples", "real")}
            for seed, (path, count) in enumerate(zip(paths.values(), (n, m), strict=True)):
                features(path, count, width, seed)
            settings = {"part": part} | {name: str(path) for name, path in paths.items()}
            with Worker(Contender("cell", "benchmarks.distances:cell", settings)) as worker:
                row |= worker.ask()
            print(row, flush=True)
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """The tables, in markdown."""
    found = {(row["part"], row["samples"], row["real"], row["width"]): row for row in rows}

    def work(row: dict[str, Any]) -> float:
        return operations(row["part"], row["samples"], row["real"], row["width"])

    def text(row: dict[str, Any]) -> str:
        if "mib" in row:
            return f"{row['seconds']:.3g} s, {row['mib']:,.0f} MiB"
        if not (ran := [r for r in rows if r["part"] == row["part"] and "mib" in r]):
            return "not run"
        largest = max(ran, key=work)
        seconds = work(row) / work(largest) * largest["seconds"]
        if seconds < 90:
            return f"≈ {seconds:.0f} s"
        return f"≈ {seconds / 60:.0f} min" if seconds < 5400 else f"≈ {seconds / 3600:.0f} h"

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
    """Measure, write the numbers, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--more", action="store_true", help="keep the cells of the last call, and continue with the rest"
    )
    arguments = parser.parse_args()
    known = json.loads(FILE.read_text(encoding="utf-8"))["rows"] if arguments.more else []
    rows = measure(arguments.minutes, known)
    FILE.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(page(rows))


if __name__ == "__main__":
    main()
