"""Several processes that work as one (torchrun): launch, rank, size and agreement.

A stage that runs alone has rank 0 and size 1, and nothing is exchanged. No random draw depends on which process does
which part of the work, so the number of processes changes a result only by rounding.
"""

# torch is imported where it is needed: a stage checks its parameters before it loads torch
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.errors import UserError
from ddpm.runtime import gpus
from ddpm.runtime.signals import Interrupted

if TYPE_CHECKING:
    from torch import Tensor

    from ddpm.config.schema import Runtime

TIMEOUT = timedelta(hours=1)  # the others wait while rank 0 draws a preview
_joined = False


def is_worker() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(runtime: "Runtime") -> None:
    """Run this stage in several processes by torchrun. If one fails, exit with the code of the first that failed.

    When a process dies, torchrun ends the others. Several machines find each other by torchrun's own variables, PET_*.

    Raises:
        Interrupted: a signal has stopped the run.
        UserError: a signal has ended one of the processes.
        SystemExit: a process has failed, and has printed why.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # faults are reported below, in one line
    gpus_here = torch.cuda.device_count()
    count = runtime.processes or max(1, gpus_here)
    if runtime.device != "cpu" and 0 < gpus_here < count:
        print(
            f"runtime.processes = {count}: more than this machine's {gpus_here} GPU{'s' * (gpus_here > 1)}; processes "
            "that share a GPU are slower than one process per GPU",
            flush=True,
        )
    if runtime.device != "cpu" and (places := gpus.take(gpus.names(), count)):
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.visible(places, os.environ.get("CUDA_VISIBLE_DEVICES"))
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
                    f"process {rank} of the run was ended by {signal.Signals(-code).name}; run the same command to "
                    "resume"
                ) from None
        sys.exit(fault.get_first_failure()[1].exitcode)


@contextmanager
def as_worker() -> Iterator[None]:
    """Work as one of the processes that torchrun has started. Only rank 0 prints, except errors.

    Raises:
        UserError: the connection to another process is lost, or NCCL has failed.
    """
    silent = os.environ["RANK"] != "0"
    if silent:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, which torch does
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere) if silent else nullcontext():
            join()
            yield
            leave()
    except RuntimeError as error:  # gloo raises no more specific class
        if "gloo" not in str(error) and not type(error).__name__.startswith("Dist"):
            raise
        if "NCCL" in str(error):
            what = f"NCCL failed: {' '.join(str(error).split())[:300]}"
        else:
            what = "another process of the run has ended"
        raise UserError(f"process {os.environ['RANK']}: {what}; run the same command to resume") from None


def join() -> None:
    """Connect to the other processes: by NCCL where each process of the run has a GPU of its own, else by gloo."""
    global _joined
    import torch
    import torch.distributed as dist

    gpu_each = int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count()  # NCCL refuses two processes on one
    store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store.set(f"gpu_each_{rank}", str(gpu_each))  # machines may differ, and all have to choose the same
    gpu_each = all(store.get(f"gpu_each_{other}") == b"True" for other in range(count))
    backend = "cpu:gloo,cuda:nccl" if gpu_each else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    _joined = True


def leave() -> None:
    """End the connection: gloo's threads would abort the process if Python ended while they run."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Which process this is. Only process 0 writes files and prints."""
    return int(os.environ["RANK"]) if _joined else 0


def size() -> int:
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if _joined else 1


def local_rank() -> int:
    """Which of the processes on this machine this is, and so which GPU is its own."""
    return int(os.environ["LOCAL_RANK"]) if _joined else 0


def share(count: int) -> slice:
    """The rows of a batch of `count` rows that this process works on; `size()` has to divide `count`."""
    part = count // size()
    return slice(rank() * part, (rank() + 1) * part)


def mean(values: "Tensor") -> "Tensor":
    """Replace `values`, a tensor of any shape on the CPU, by the mean over all processes, and return it."""
    if size() > 1:
        import torch.distributed as dist

        dist.all_reduce(values)
        values /= size()
    return values


def gathered(values: "Tensor") -> "Tensor":
    """The rows of all processes, in the order of their ranks: (n, ...) on the CPU in each, to (size() * n, ...)."""
    if size() == 1:
        return values
    import torch
    import torch.distributed as dist

    everything = torch.empty(size() * len(values), *values.shape[1:], dtype=values.dtype)
    dist.all_gather_into_tensor(everything, values.contiguous())
    return everything


def any_process(here: bool) -> bool:
    """Whether `here` is true in any process. All have to call it, and each waits for all."""
    if size() == 1:
        return here
    import torch
    import torch.distributed as dist

    flag = torch.tensor(float(here))
    dist.all_reduce(flag)
    return bool(flag > 0)


def barrier() -> None:
    """Wait until every process has called this."""
    any_process(False)  # on the CPU: torch's own barrier would need a device
