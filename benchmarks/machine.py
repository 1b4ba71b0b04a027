"""The facts of the machine on which the numbers depend."""

import os
from pathlib import Path
from platform import processor, python_version
from typing import Any


def machine() -> dict[str, Any]:
    """The facts by name; None for what is not there."""
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
