"""A GPU of its own for each run on this machine: a lock per device, which the kernel frees however the run ends.

Without the locks, all runs of `dvc queue start -j 4` would use the first GPU.
"""

import fcntl
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LOCKS = Path("/tmp")  # shared by the whole machine: TMPDIR may belong to one job
POLL = 1.0  # seconds between two looks for a free device
_held: list[int] = []  # the locked files, open until the process ends


def names() -> list[str]:
    """The UUIDs of the GPUs that this process sees."""
    import torch

    return [str(torch.cuda.get_device_properties(place).uuid) for place in range(torch.cuda.device_count())]


def visible(places: Sequence[int], present: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES for some of the devices that this process sees.

    Args:
        places: the indices of these devices.
        present: the variable's value now; None where it is not set.
    """
    known = present.split(",") if present else None
    return ",".join(known[place] if known else str(place) for place in places)


def take(names: Sequence[str], count: int = 1, locks: Path = LOCKS) -> list[int]:
    """Lock `count` of these devices until this process ends; wait while fewer of them are free.

    A run locks all of its devices at once or none, so that two runs never wait for each other.

    Args:
        names: one per device, the same in every process of the machine, such as a GPU's UUID.
        count: how many devices to lock; all of them where there are fewer.
        locks: the folder of the locks.

    Returns:
        The indices of the locked devices in `names`.
    """
    count, reported = min(count, len(names)), False
    while True:
        taken: dict[int, int] = {}
        for place, name in enumerate(names):
            if len(taken) < count and (file := _lock(locks / f"ddpm-gpu-{name}.lock")) is not None:
                taken[place] = file
        if len(taken) == count:
            _held.extend(taken.values())
            return list(taken)
        for file in taken.values():
            os.close(file)
        if not reported:
            print(f"waiting for {count} of {len(names)} GPUs, which other runs hold", file=sys.stderr, flush=True)
            reported = True
        time.sleep(POLL)


def _lock(path: Path) -> int | None:
    """Lock a file, created if it is missing, and return its descriptor; None where another process holds the lock."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # another user's may be read, but not opened with O_CREAT
    except FileNotFoundError:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file
