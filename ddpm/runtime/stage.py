"""Run a stage: read parameters, set the environment, print user errors in one line, turn signals into exit codes."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm.errors import UserError
from ddpm.runtime import processes, signals, workspace

# Kernels that every x86-64 processor since 2013 has, so that each computes the same bits. Read when the
# libraries are loaded: once torch or numpy is imported it is too late.
REPRODUCIBLE_ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_DYNAMIC": "FALSE",  # else it takes fewer threads than asked for on a small machine
    "OMP_DYNAMIC": "FALSE",
    "OPENBLAS_CORETYPE": "Haswell",
    # numpy's exp and log in float64 have other last bits with AVX-512, and qemu's AVX2 sorts wrongly
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
# How long an idle OpenMP thread spins before it sleeps. At the default of 300,000 two trainings on the same two cores
# slow each other down 4 times instead of 2.8; alone, 1,000 costs about 4 %. No effect on the bytes.
OPENMP_SPINS = "1000"
# Faults of the machine that a user can fix; any other OSError is a bug
SYSTEM_FAULTS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EIO,
)


def run_stage(main: Callable[[Any], None], sections: tuple[str, ...]) -> None:
    """Run `main(params)` with the named sections of params.yaml, and end the process with its exit code.

    0 when done; 1 with one line per fault on stderr for what a user can fix; 128 + n after signal n.
    A bug in the program keeps its traceback.
    """
    signals.raise_on_signals()
    try:
        # dvc and its stages are in one group; torchrun gives each process its own
        signals.die_with_parent(shares_group="DVC_STAGE" in os.environ and not processes.is_worker())
        _check_checkout()
        from ddpm.config.load import load_params  # slow to import; the signal handlers must be in place first

        params = load_params(sections)
        _set_environment(params)
        workspace.shorten_sockets()
        _start(main, params)
    except signals.Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)
    except UserError as fault:
        _exit_with(str(fault))
    except OSError as fault:
        if fault.errno not in SYSTEM_FAULTS:
            raise
        _exit_with(f"{fault.filename or 'a file'}: {os.strerror(fault.errno)}")
    finally:
        signals.ignore_signals()  # the result stands: the process ends by itself now


def _check_checkout() -> None:
    """Refuse a stage's script that imports the `ddpm` of another checkout, which is the one that is installed.

    For a script, Python searches the script's own folder, stages/, and not the checkout; with `-m` it searches the
    current folder.
    """
    script, library = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[2]
    if script.parent.name == "stages" and script.parents[1] != library:
        raise UserError(f"{script}: imports ddpm from {library}, another checkout; run python -m stages.{script.stem}")


def _set_environment(params: Any) -> None:
    """Set what the libraries read when they are loaded."""
    if hasattr(params, "runtime") and params.runtime.reproducible:
        os.environ.update(REPRODUCIBLE_ENVIRONMENT)
    os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)


def _start(main: Callable[[Any], None], params: Any) -> None:
    """Run `main` here, alone or as one of torchrun's processes, or launch those."""
    if not hasattr(params, "runtime") or params.runtime.launcher == "none":
        with workspace.exclusive_folder():
            main(params)
    elif processes.is_worker():
        with processes.as_worker():
            main(params)
    elif "PET_NNODES" in os.environ and "DVC_STAGE" not in os.environ:
        processes.launch(params.runtime)  # on a further machine: dvc, and the lock of the folder, are on the first
    else:
        with workspace.exclusive_folder():
            processes.launch(params.runtime)


def _exit_with(text: str) -> None:
    for line in text.splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1)
