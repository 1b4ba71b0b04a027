"""Several processes that work as one (torchrun): which of them this is, and how all of them agree.

A stage that runs alone has size 1, and every function here then does nothing. Which process does which part of the
work never decides a random draw, so the number of processes changes a result by rounding alone.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm.config.schema import Runtime

TIMEOUT = timedelta(hours=1)  # for a process that is behind, as the first is while it draws a preview


def join(runtime: Runtime) -> None:
    """Find the other processes, where this one was started by a launcher."""
    if runtime.launcher != "none" and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)


def rank() -> int:
    """Which process this is. Only process 0 writes files, and talks."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Which of the processes on this machine this is, and so which GPU is its own."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def share(count: int) -> slice:
    """The rows of a batch of `count` that this process works on; `size()` has to divide `count`."""
    part = count // size()
    return slice(rank() * part, (rank() + 1) * part)


def mean(values: Tensor) -> Tensor:
    """The mean over all processes of a tensor that lies in the CPU's memory."""
    if size() > 1:
        dist.all_reduce(values)
        values /= size()
    return values


def anywhere(here: bool) -> bool:
    """Whether `here` holds in any process. Each waits for all, so this is a barrier as well."""
    if size() == 1:
        return here
    flag = torch.tensor(float(here))
    dist.all_reduce(flag)
    return bool(flag > 0)
