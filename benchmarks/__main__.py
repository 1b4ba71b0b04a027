"""Measure this project beside its peers, and write benchmarks/results/."""

import argparse
import os
import time
from pathlib import Path
from platform import processor, python_version
from types import ModuleType
from typing import Any

from benchmarks import growth, quality, report, sampling, train_step, whole
from ddpm.runtime.stage import OPENMP_SPINS

MEASUREMENTS: dict[str, ModuleType] = {
    "train_step": train_step,
    "sampling": sampling,
    "quality": quality,
    "whole": whole,
    "growth": growth,
}


def machine() -> dict[str, Any]:
    """The facts of the machine on which the numbers depend."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "CPU": f"{models[0] if models else processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{memory:.0f} GiB",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "Python": python_version(),
        "torch": torch.__version__,
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


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
    report.write(MEASUREMENTS)


if __name__ == "__main__":
    main()
