"""How a stage runs: parameters in, environment set, faults told in one line, signals turned into exit codes."""

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ddpm.config import load_params
from ddpm.errors import UserError

# Kernels that every x86-64 processor since 2013 has, so that each computes the same bits. Read when the
# libraries are loaded: once torch or numpy is imported it is too late.
REPRODUCIBLE_ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_DYNAMIC": "FALSE",  # else it takes fewer threads than it is told on a small machine
    "OMP_DYNAMIC": "FALSE",
    "OPENBLAS_CORETYPE": "Haswell",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
# How long an idle OpenMP thread spins before it sleeps. At the default of 300,000 two trainings on the same two cores
# slow each other down 4 times instead of 2.8; alone, 1,000 costs about 4 %. No effect on the bytes.
SPINS = "1000"
PR_SET_PDEATHSIG = 1


class Interrupted(BaseException):
    """A signal asked the stage to stop. Not an `Exception`, so that no handler of faults swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def root() -> Path:
    """The folder that holds the resume state, the downloads and the W&B runs.

    DVC sets DVC_ROOT for its stages; inside the temporary workspace of a queued experiment it names the
    main checkout, so that what is kept there outlives the workspace.
    """
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def run_stage(main: Callable[[Any], None], sections: tuple[str, ...]) -> None:
    """Run `main(params)` with the named sections of params.yaml, and end the process with its exit code.

    0 when done; 1 with one line a fault on stderr for what a person can mend; 128 + n after signal n.
    A bug in the program keeps its traceback.
    """
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _interrupt)
    try:
        _die_with_parent()
        params = load_params(sections)
        if hasattr(params, "runtime") and params.runtime.reproducible:
            os.environ.update(REPRODUCIBLE_ENVIRONMENT)
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        main(params)
    except Interrupted as stop:
        print(f"stopped by {signal.Signals(stop.signum).name}; run it again to go on", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except UserError as fault:
        _exit_with(str(fault))
    except OSError as fault:
        if fault.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.EROFS,
            errno.EPERM,
            errno.EFBIG,
            errno.ENOTDIR,
            errno.EIO,
        ):
            raise
        _exit_with(f"{fault.filename or 'a file'}: {os.strerror(fault.errno)}")


def _exit_with(text: str) -> None:
    for line in text.splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)


@contextmanager
def signals_deferred() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of raising, so that a loop can stop between two steps."""
    received: list[int] = []
    handlers = {
        signum: signal.signal(signum, lambda number, frame: received.append(number))
        for signum in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _die_with_parent() -> None:
    """Have the kernel send SIGTERM when dvc dies, so that no orphan writes beside its successor. Linux only."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call
        raise Interrupted(signal.SIGTERM)
