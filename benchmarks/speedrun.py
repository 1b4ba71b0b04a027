"""The speedrun board: CPU-seconds of training on one core until the samples are as near to the real images as stated.

    python -m benchmarks.speedrun                    # the digits; with --colour <folder> 32x32 photographs
    python -m benchmarks.speedrun --what "Adam" --configuration optimizer=adam optimizer.lr=4e-3

The learning rate falls to zero at the end, so that each number of steps is a training of its own. From a first number
on, up or down by a factor of the square root of 2, the first two are found between which the mean distance of the seeds
meets the target; log(distance) is taken as a straight line in log(seconds) between them. The result is a row of
benchmarks/results/speedrun.json; `python -m benchmarks --render` writes the page.
"""

import argparse
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import colour, quality
from benchmarks.machine import machine
from benchmarks.quality import Row
from benchmarks.report import RESULTS, table
from ddpm.evaluation.card import measured
from ddpm.runtime.stage import OPENMP_SPINS

TITLE = "Speedrun board"
FILE = RESULTS / "speedrun.json"
TARGETS = {"digits": 0.040, "colour": 400.0}  # +experiment=short has 355 in colour after 9 CPU-minutes
FIRST = {"digits": 800, "colour": 600}  # steps of the first trainings
SEEDS = (1, 2, 3)
RUNGS = 9  # lengths of training that are tried at most: up to 16 times the first


def around(train: Callable[[int], list[Row]], target: float, first: int) -> tuple[list[Row], list[Row]]:
    """The trainings of all seeds with a number of steps that misses the target, and with the next that meets it.

    Raises:
        ValueError: none do.
    """

    def misses(rows: list[Row]) -> bool:
        return fmean(row["distance"] for row in rows) > target

    rows = train(first)
    up = misses(rows)
    for k in range(1, RUNGS):
        before, rows = rows, train(max(1, round(first * 2 ** (k / 2 if up else -k / 2))))
        if misses(rows) != up:
            return (before, rows) if up else (rows, before)
    raise ValueError(f"from {first} to {rows[0]['steps']} steps, the distance does not pass {target:g}")


def seconds_to(target: float, missed: list[Row], met: list[Row]) -> tuple[float, float]:
    """CPU-seconds to the target, with the standard error over the seeds (jackknife)."""

    def between(missed: list[Row], met: list[Row]) -> float:
        x, y = (
            [math.log(fmean(row[key] for row in rows)) for rows in (missed, met)] for key in ("seconds", "distance")
        )
        return math.exp(x[0] + (math.log(target) - y[0]) * (x[1] - x[0]) / (y[1] - y[0]))

    n = len(met)
    without = [between(missed[:i] + missed[i + 1 :], met[:i] + met[i + 1 :]) for i in range(n)]
    error = math.sqrt((n - 1) / n * sum((value - fmean(without)) ** 2 for value in without))
    return between(missed, met), error


def measure(data: quality.Data, kind: str, overrides: list[str], quick: bool) -> Row:
    """The seconds of a configuration, with its error, on one kind of data."""
    entry = quality.mine(*overrides)
    target, first, seeds = (2.0, 10, SEEDS[:2]) if quick else (TARGETS[kind], FIRST[kind], SEEDS)

    def train(steps: int) -> list[Row]:
        rows = [quality.trained(entry, "default", seed, data, lambda train: (steps, train(steps))) for seed in seeds]
        print("".join(f"  {row}\n" for row in rows), end="", flush=True)
        return rows

    seconds, error = seconds_to(target, *around(train, target, first))
    return {"data": kind, "target": target, "seconds": seconds, "error": error}


def commit() -> str:
    """The commit of the checkout, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=RESULTS, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def page(result: dict[str, Any]) -> str:
    """The table."""
    rows = [
        (
            row["what"],
            f"{row['data']}, {row['target']:g}",
            row["commit"],
            f"{row['machine']['CPU']}, torch {row['machine']['torch']}",
            measured({"": row["seconds"], "_se": row["error"]}, ""),
        )
        for row in result["rows"]
    ]
    return (
        "CPU-seconds of training by one thread until the samples have this Fréchet distance (mean of "
        f"{len(SEEDS)} seeds, ± standard error): of {quality.COUNT:,} digits in pixel space from all digits; of "
        f"{colour.COUNT:,} photographs in EfficientNet-Lite0's features from 10,000 test images. `make speedrun` "
        "adds a line.\n\n" + table(("what", "target", "commit", "machine", "CPU-seconds"), rows)
    )


def main() -> None:
    """Measure one line of the board."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speedrun", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--colour", type=Path, metavar="folder", help="of images: +experiment=short on them")
    parser.add_argument("--work", type=Path, help="a folder that keeps the prepared images for the next call")
    parser.add_argument("--what", help="what changed, as text for the board; default: the configuration")
    parser.add_argument("--configuration", nargs="+", default=[], metavar="key=value", help="changed parameters")
    parser.add_argument("--quick", action="store_true", help="only check that everything works; keeps no number")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": OPENMP_SPINS}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.colour:
            kind, overrides = "colour", [*colour.PRESET, *arguments.configuration]
            data = colour.photographs(arguments.colour, arguments.work or Path(folder), arguments.quick)
        else:
            kind, overrides = "digits", arguments.configuration
            data = quality.digits(Path(folder), 40 if arguments.quick else quality.COUNT)
        what = arguments.what or " ".join(overrides) or "the default"
        row = {"what": what, "commit": commit(), "machine": machine()} | measure(data, kind, overrides, arguments.quick)
    print(page({"rows": [row]}))
    if not arguments.quick:
        rows = json.loads(FILE.read_text(encoding="utf-8"))["rows"] if FILE.exists() else []
        FILE.write_text(json.dumps({"rows": [*rows, row]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
