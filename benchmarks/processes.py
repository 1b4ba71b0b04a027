"""What further processes bring: python -m benchmarks.processes --folder F

The stages train, sample and evaluate in 1 to 4 processes of one thread each, by gloo, on the digits. The numbers of
samples and of images do not divide by the number of processes.
"""

import argparse
import hashlib
import re
from pathlib import Path

from benchmarks.million import Stage
from benchmarks.report import table

SETTINGS = (
    "dataset=digits",
    "model=small",
    "model.attention=[false,false]",
    "evaluate=pixels",
    "evaluate.loss_images=350",
    "evaluate.bound_images=5",
    "train.batch_size=96",
    "train.steps=150",
    "sample.count=1003",
    "sample.batch_size=59",
    "sample.steps=10",
)
COUNTS = (4, 3, 2, 1)  # the last trains the model that all sample from


def run(folder: Path, stage: str, count: int) -> tuple[float, str]:
    """The seconds of a stage in so many processes, and what it printed."""
    several = (f"runtime.processes={count}", "runtime.launcher=torchrun") if count > 1 else ()
    job = Stage(folder, stage, *SETTINGS, *several)
    return job.end()["seconds"], job.out


def speed(printed: str) -> float:
    """Images trained per second."""
    found = re.search(r"([\d,]+) images in (\d+) s", printed)
    assert found, printed
    return int(found[1].replace(",", "")) / int(found[2])


def digest(*files: Path) -> str:
    """The start of the SHA-256 of these files."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the stages work")
    folder = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    run(folder, "prepare_data", 1)
    trained = {count: speed(run(folder, "train", count)[1]) for count in COUNTS}
    rows = []
    for count in reversed(COUNTS):
        sampled, evaluated = (run(folder, stage, count)[0] for stage in ("sample", "evaluate"))
        bytes_of = digest(folder / "samples/images.npy", folder / "results/evaluate/metrics.json")
        rows.append((count, f"{trained[count]:,.0f}", f"{sampled:.0f}", f"{evaluated:.0f}", bytes_of))
    print(table(("processes", "trained img/s", "sample, s", "evaluate, s", "bytes of samples and metrics"), rows))


if __name__ == "__main__":
    main()
