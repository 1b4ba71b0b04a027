"""How a stage runs: parameters in, environment set, faults told in one line, signals turned into exit codes."""

import ctypes
import errno
import fcntl
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from multiprocessing.util import get_temp_dir
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from ddpm.errors import UserError, legible

# Kernels that every x86-64 processor since 2013 has, so that each computes the same bits. Read when the
# libraries are loaded: once torch or numpy is imported it is too late.
REPRODUCIBLE_ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_DYNAMIC": "FALSE",  # else it takes fewer threads than it is told on a small machine
    "OMP_DYNAMIC": "FALSE",
    "OPENBLAS_CORETYPE": "Haswell",
    # numpy's exp and log in float64 have other last bits with AVX-512, and qemu's AVX2 sorts wrongly
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
# How long an idle OpenMP thread spins before it sleeps. At the default of 300,000 two trainings on the same two cores
# slow each other down 4 times instead of 2.8; alone, 1,000 costs about 4 %. No effect on the bytes.
SPINS = "1000"
PR_SET_PDEATHSIG = 1
LAUNCHED = "TORCHELASTIC_RUN_ID"  # set where torchrun has started the process
# The address of a socket has 104 bytes on macOS, 108 on Linux, its end included; multiprocessing's names take 32.
LONGEST_TMPDIR = 103 - len("/pymp-12345678/listener-12345678")
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
PATIENCE = 60.0  # seconds to wait for a process that was told to stop and still saves


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
        _check_checkout()
        from ddpm.config.schema import load_params  # takes its time to load: signals have to be told in one line by now

        params = load_params(sections)
        if hasattr(params, "runtime") and params.runtime.reproducible:
            os.environ.update(REPRODUCIBLE_ENVIRONMENT)
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        _shorten_sockets()
        several = hasattr(params, "runtime") and params.runtime.launcher == "torchrun"
        if several and LAUNCHED in os.environ:
            with _one_of_several():
                main(params)
        elif several and "PET_NNODES" in os.environ and "DVC_STAGE" not in os.environ:
            _run_several(params.runtime)  # on a further machine: dvc, and the lock of the folder, are on the first
        else:
            with _alone_here():
                _run_several(params.runtime) if several else main(params)
    except Interrupted as stop:
        print(_told(stop.signum), file=sys.stderr)
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
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)  # what is done is done: the process ends by itself now


def _check_checkout() -> None:
    """Refuse a stage that runs as a script with the `ddpm` of another checkout, where that one is installed.

    Python looks for a script's imports in the script's own folder, not in the folder above; `-m` does.
    """
    script, library = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[2]
    if script.parent.name == "stages" and script.parents[1] != library:
        raise UserError(f"{script}: imports ddpm from {library}, another checkout: python -m stages.{script.stem}")


def _exit_with(text: str) -> None:
    for line in text.splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1)


def _told(signum: int) -> str:
    return f"stopped by {signal.Signals(signum).name}; run it again to go on"


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Stop here. While a library is imported nothing may catch that: torch goes on without the numpy it was loading."""
    while frame:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            os.write(2, f"{_told(signum)}\n".encode())
            os._exit(128 + signum)
        frame = frame.f_back
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


def lock(file: int, place: Path, whose: str) -> None:
    """Lock an open file or folder until it is closed. The kernel frees it, however the process ends.

    Args:
        whose: who else may hold it, for the message.

    Raises:
        UserError: another process holds it and does not end in time.
        OSError: the file system has no such locks.
    """
    deadline, told = time.monotonic() + PATIENCE, False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(f"{place}: {whose}; wait for it or stop it") from None
        if not told:
            print(f"{place}: {whose}; waiting for its end", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.1)


@contextmanager
def _alone_here() -> Iterator[None]:
    """Hold the folder that the stage works in: one that was told to stop, and still does, writes to the same files."""
    folder = os.open(".", os.O_RDONLY)
    try:
        with suppress(OSError):  # NFS locks no folders
            lock(folder, Path.cwd(), "another stage is at work here")
        yield
    finally:
        os.close(folder)


def _run_several(runtime: Any) -> None:
    """Run the stage in several processes by torchrun, and end with the exit code of the one that ended first.

    A process that dies takes the others with it. Several machines find each other by torchrun's own variables, PET_*.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what went wrong is told below, in one line
    count = runtime.processes or max(1, torch.cuda.device_count())
    threads = runtime.threads or max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    module = sys.modules["__main__"].__spec__
    stage = ["--module", module.name] if module else [sys.argv[0]]  # as `python -m stages.train`, or as a script
    here = [] if "PET_NNODES" in os.environ else ["--standalone"]
    try:
        run(parse_args([*here, f"--nproc-per-node={count}", "--max-restarts=0", *stage]))
    except SignalException as stop:
        raise Interrupted(stop.sigval) from None
    except ChildFailedError as fault:
        codes = {rank: failure.exitcode for rank, failure in fault.failures.items()}
        for rank, code in codes.items():
            if code < 0:
                raise UserError(
                    f"process {rank} of the run was ended by {signal.Signals(-code).name}; run it again to go on"
                ) from None
        sys.exit(fault.get_first_failure()[1].exitcode)


@contextmanager
def _one_of_several() -> Iterator[None]:
    """The first process talks for all, faults apart; a lost connection is told in one line."""
    silent = os.environ["RANK"] != "0"
    if silent:
        os.environ["TQDM_DISABLE"] = "1"
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere) if silent else nullcontext():
            yield
    except RuntimeError as error:  # gloo has no class of its own
        if "gloo" not in str(error) and not type(error).__name__.startswith("Dist"):
            raise
        raise UserError(f"process {os.environ['RANK']}: another process of the run has ended") from None


def _shorten_sockets() -> None:
    """Where TMPDIR is too long for the address of a socket, let worker processes meet in another folder.

    Only the sockets go there: TMPDIR is where a person wants large files.
    """
    try:
        folder = tempfile.gettempdir()
    except OSError:  # no folder at all: told where one is needed
        return
    if len(os.fsencode(folder)) <= LONGEST_TMPDIR:
        return
    for short in SHORT_FOLDERS:
        tempfile.tempdir = short
        try:
            get_temp_dir()  # multiprocessing keeps to what it has made, in this process and in its children
        except OSError:
            continue
        finally:
            tempfile.tempdir = folder
        return
    raise UserError(
        f"TMPDIR = {legible(Path(folder))}: too long for the sockets of worker processes, which need "
        f"{LONGEST_TMPDIR} bytes at most, and none of {', '.join(SHORT_FOLDERS)} can be written; set a shorter one"
    )


def seconds_since_start() -> float:
    """How long ago this process began."""
    return time.time() - psutil.Process().create_time()


def _die_with_parent() -> None:
    """Stop by SIGTERM when dvc dies, so that no orphan writes beside its successor."""
    parent = os.getppid()
    above = [parent]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if "exec-run" in _of_process(parent, "cmdline").split("\0"):
            above.append(worker := _parent(parent))  # of dvc's queue: without it nobody collects what dvc makes
            _watch(lambda: _parent(parent) == worker)
    else:
        _watch(lambda: os.getppid() == parent)
    in_group = "DVC_STAGE" in os.environ and LAUNCHED not in os.environ  # a launcher gives each process its own
    if os.getppid() != parent or (in_group and not all(map(_in_our_group, above))):
        raise Interrupted(signal.SIGTERM)  # it had died before


def _of_process(pid: int, what: str) -> str:
    """A file of Linux's /proc; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/{what}").read_text(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    """The parent of another process; -1 where there is no such process."""
    fields = _of_process(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else -1


def _in_our_group(pid: int) -> bool:
    """Whether a process is in the group of dvc and its stages, as whoever adopts an orphan is not."""
    try:
        return os.getpgid(pid) == os.getpgrp()
    except ProcessLookupError:
        return False


def _watch(lives: Callable[[], bool]) -> None:
    """Send this process a SIGTERM within half a second of the end of what it depends on."""

    def watch() -> None:
        while lives():
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
