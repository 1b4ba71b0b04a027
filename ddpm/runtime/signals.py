"""Signals: how SIGTERM and SIGINT interrupt a stage, and how the death of its parent becomes a SIGTERM."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1


class Interrupted(BaseException):
    """A signal asked the stage to stop. Not an `Exception`, so that no `except Exception` swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}; run the same command to resume"


def raise_on_signals() -> None:
    """From now on SIGTERM and SIGINT raise `Interrupted`, or end the process where a library is being imported."""
    for signum in STOPPING:
        signal.signal(signum, _interrupt)


def ignore_signals() -> None:
    """From now on SIGTERM and SIGINT change nothing."""
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise `Interrupted`. During an import exit at once: torch swallows the exception and continues without NumPy."""
    stop = Interrupted(signum)
    while frame:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            os.write(2, f"{stop}\n".encode())
            os._exit(128 + signum)
        frame = frame.f_back
    raise stop


@contextmanager
def signals_deferred() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of raising, so that a loop can stop between two steps."""
    received: list[int] = []
    handlers = {signum: signal.signal(signum, lambda number, frame: received.append(number)) for signum in STOPPING}
    try:
        yield received
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def die_with_parent(shares_group: bool) -> None:
    """Have SIGTERM sent to this process when dvc dies, so that no orphan writes beside its successor.

    Args:
        shares_group: whether the parent has to be in this process's group, as dvc is; a parent outside the group has
            adopted an orphan.

    Raises:
        Interrupted: the parent has died already.
    """
    parent = os.getppid()
    above = [parent]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if "exec-run" in _of_process(parent, "cmdline").split("\0"):
            above.append(worker := _parent(parent))  # of dvc's queue: without it nothing collects the outputs
            _watch(lambda: _parent(parent) == worker)
    else:
        _watch(lambda: os.getppid() == parent)
    if os.getppid() != parent or (shares_group and not all(map(_in_our_group, above))):
        raise Interrupted(signal.SIGTERM)


def _of_process(pid: int, what: str) -> str:
    """The text of Linux's /proc/<pid>/<what>; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/{what}").read_text(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    """The parent of another process; -1 where there is no such process."""
    fields = _of_process(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else -1


def _in_our_group(pid: int) -> bool:
    """Whether `pid` shares our process group; the process that adopts an orphan does not."""
    try:
        return os.getpgid(pid) == os.getpgrp()
    except ProcessLookupError:
        return False


def _watch(lives: Callable[[], bool]) -> None:
    """Send ourselves SIGTERM within half a second after `lives()` turns false."""

    def watch() -> None:
        while lives():
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
