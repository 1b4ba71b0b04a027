"""How the cost grows with the work. Each point is a process of its own, so that its peak of memory is its own."""

import math
import tempfile
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ours
from benchmarks.report import curves, table
from benchmarks.workers import Contender, alone

TITLE = "Cost as the work grows"
COSTS = {"seconds": "seconds", "mib": "peak MiB"}


def points(quick: bool, folder: Path) -> Iterator[tuple[str, int, str, dict[str, Any]]]:
    """What grows, to where, what does the work, and its settings."""
    step = {"channels": 32 if quick else 128, "steps": 1 if quick else 2, "overrides": ours.FASTEST}
    for size in (8, 16) if quick else (16, 32, 64):
        yield "image size, a training step of 4", size, "training", step | {"size": size, "batch": 4}
    for batch in (1, 2) if quick else (1, 2, 4, 8, 16):
        yield "batch, a training step at 32x32", batch, "training", step | {"size": 32, "batch": batch}
    for count in (100, 1000) if quick else (1_000, 10_000, 100_000):
        path = folder / f"{count}.npy"
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 32, 32, 3))
        images[:] = np.random.default_rng(0).integers(0, 256, images[:100].shape, np.uint8).repeat(count // 100, 0)
        what = "images in the file, reading a batch of 64"
        yield what, count, "reading", {"images": str(path), "batch": 64, "steps": 200}
    for count in (32, 64) if quick else (64, 256, 1024):
        yield "samples drawn", count, "drawing", {"count": count}


def measure(quick: bool, compiled: bool) -> dict[str, Any]:
    """The cost of each point."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what, n, function, settings in points(quick, Path(folder)):
            contender = Contender(what, f"benchmarks.ours:{function}", settings, ours.environment(False))
            rows.append({"what": what, "n": n} | {name: alone(contender)[name] for name in COSTS})
            print(f"  {rows[-1]}", flush=True)
    return {"rows": rows}


def exponent(rows: list[dict[str, Any]], cost: str) -> float:
    """k of cost = c n^k, by least squares on the logarithms."""
    x, y = ([math.log(row[name]) for row in rows] for name in ("n", cost))
    return float(np.polyfit(x, y, 1)[0])


def _series(result: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for what, rows in groupby(result["rows"], itemgetter("what")):
        yield what, list(rows)


def page(result: dict[str, Any]) -> str:
    """The table."""
    cells: list[tuple[str, ...]] = []
    for what, rows in _series(result):
        for row in rows:
            cells.append((what, f"{row['n']:,}", f"{row['seconds']:.3g}", f"{row['mib']:,.0f}"))
        cells.append(("… grows as", "n", *(f"n^{exponent(rows, cost):.2f}" for cost in COSTS)))
    return (
        "The exponents are fitted on the logarithms. The peak of memory is that of a whole process: libraries, weights "
        "and optimizer have their part in it whatever the work. The pages of a memory-mapped file that were read count "
        "too, though the system takes them back where memory is short.\n\n"
    ) + table(("what grows", "n", *COSTS.values()), cells)


def chart(result: dict[str, Any]) -> dict[str, Any]:
    """Each cost relative to its first point."""
    panels = []
    for cost, title in COSTS.items():
        values = [
            {
                "name": f"{what}: n^{exponent(rows, cost):.2f}",
                "x": row["n"] / rows[0]["n"],
                "y": row[cost] / rows[0][cost],
            }
            for what, rows in _series(result)
            for row in rows
        ]
        panels.append(curves("n, relative to the least", f"{title}, relative to the first", values))
    return {"vconcat": panels, "resolve": {"scale": {"color": "independent"}}}
