"""Measure this project beside its peers, and write benchmarks/results/."""

import argparse
import os
import time
from types import ModuleType

from benchmarks import colour, growth, quality, report, sampling, speedrun, train_step, whole
from benchmarks.machine import machine
from ddpm.runtime.stage import OPENMP_SPINS

MEASUREMENTS: dict[str, ModuleType] = {
    "train_step": train_step,
    "sampling": sampling,
    "quality": quality,
    "whole": whole,
    "growth": growth,
}
SECTIONS = MEASUREMENTS | {"colour": colour, "speedrun": speedrun}  # of the page; these have commands of their own


def main() -> None:
    """Run the measurements that are asked for, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(MEASUREMENTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="only check that everything works")
    parser.add_argument("--compile", action="store_true", help="use torch.compile, ours and diffusers'")
    parser.add_argument("--render", action="store_true", help="only write the page again from the existing numbers")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(MEASUREMENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(MEASUREMENTS)}")
    # our stages set the spins: without them, other load on the machine slows a contender several times as much
    os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": OPENMP_SPINS}
    for name in [] if arguments.render else arguments.names or MEASUREMENTS:
        print(f"{name}:", flush=True)
        start, facts = time.perf_counter(), machine()
        numbers = MEASUREMENTS[name].measure(arguments.quick, arguments.compile)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        report.keep(name, {"machine": facts, "quick": arguments.quick} | numbers)
    report.write(SECTIONS)


if __name__ == "__main__":
    main()
