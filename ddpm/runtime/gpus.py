"""A GPU of its own for each run on this machine: a lock per device, which the kernel frees however the run ends.

Without it all runs of `dvc queue start -j 4` would land on the first GPU.
"""

import fcntl
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LOCKS = Path("/tmp")  # of the whole machine: TMPDIR may be a job's own
POLL = 1.0  # seconds between two looks for a free device
_held: list[int] = []  # open until the process ends


def names() -> list[str]:
    """The UUIDs of the GPUs that this process sees."""
    import torch

    return [str(torch.cuda.get_device_properties(place).uuid) for place in range(torch.cuda.device_count())]


def visible(places: Sequence[int], present: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for some of the devices that this process sees.

    Args:
        present: its value now; None where it is not set.
    """
    known = present.split(",") if present else None
    return ",".join(known[place] if known else str(place) for place in places)


def take(names: Sequence[str], count: int = 1, locks: Path = LOCKS) -> list[int]:
    """Lock `count` of these devices for this process until it ends, and wait while there are not as many free ones.

    Either all are taken or none, so that two runs never wait for each other.

    Args:
        names: of the devices, the same in every process of the machine, as a GPU's UUID. More are asked for than there
            are: all of them.
        locks: the folder of the locks.

    Returns:
        The places of the devices in `names`.
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
            print(
                f"{count} of {len(names)} GPUs needed, and other runs have them; waiting", file=sys.stderr, flush=True
            )
            reported = True
        time.sleep(POLL)


def _lock(path: Path) -> int | None:
    """Lock a file, and make it where there is none; None: another process holds it."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # of another user: may be read, not created again
    except FileNotFoundError:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file
