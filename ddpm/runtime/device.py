"""Choose the device, its numerical exactness and the kernels of a training; measure and explain memory."""

import os
import resource
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from ddpm.config.schema import Runtime, Train
from ddpm.errors import UserError
from ddpm.runtime import gpus, processes

# In the messages of the CPU's allocator; of cuBLAS and cuDNN; of CUDA and NCCL
NO_MEMORY = ("allocate memory", "ALLOC_FAILED", "out of memory")
COMPILE_FROM = 10_000  # steps: in more than that, compiled steps save more than the minute or two of compiling


def choose_device(runtime: Runtime) -> torch.device:
    """Choose the device, set torch's exactness for it, and print both.

    A GPU is locked for this process until it ends; while other runs hold all GPUs, this waits.

    Raises:
        UserError: `runtime.device` is cuda, and this machine has no CUDA device.
    """
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise UserError("params.yaml: runtime.device = 'cuda': this machine has no CUDA device; use auto or cpu")
    if runtime.threads is not None:
        # Kernels split their sums by the number of threads: the bytes depend on this setting, not on the cores
        torch.set_num_threads(runtime.threads)
    if runtime.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda")  # the current one
        if processes.size() > 1:  # torchrun's launcher has taken the devices for all
            torch.cuda.set_device(processes.local_rank() % torch.cuda.device_count())
        else:
            for place in gpus.take(gpus.names()):
                torch.cuda.set_device(place)
        name = torch.cuda.get_device_name(device)
    else:
        device = torch.device("cpu")
        name = f"CPU, {(threads := torch.get_num_threads())} thread{'s' * (threads > 1)}"
    # (use_deterministic_algorithms would load the compiler, which takes more than a second)
    torch.set_deterministic_debug_mode("error" if runtime.reproducible else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # (filling costs time, and only hides a read of memory that was never written)
    torch.backends.cudnn.benchmark = not runtime.reproducible
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not runtime.reproducible
    several = f", one of {processes.size()} processes" if processes.size() > 1 else ""
    print(f"device: {name}{several}; {'reproducible' if runtime.reproducible else 'fastest'} kernels", flush=True)
    return device


def memory_format(runtime: Runtime, device: torch.device) -> torch.memory_format:
    """The memory format that this device's fastest kernels expect."""
    fastest = device.type == "cuda" and not runtime.reproducible
    return torch.channels_last if fastest else torch.contiguous_format


@dataclass(frozen=True)
class Kernels:
    """What a training computes with; see `choose_kernels`."""

    precision: Literal["fp32", "bf16", "fp16"]
    memory_format: torch.memory_format
    compile: bool


def choose_kernels(train: Train, runtime: Runtime, device: torch.device, steps: int) -> Kernels:
    """Resolve every `auto` for a training of `steps` steps, and print the result.

    In a reproducible run, auto chooses nothing whose result depends on the machine.

    Args:
        steps: optimizer steps of the whole training; a short one is not compiled.

    Raises:
        UserError: `train.compile` is true, and this machine cannot compile.
    """
    auto, cuda = not runtime.reproducible, device.type == "cuda"
    precision, form = train.precision, memory_format(runtime, device)
    if precision == "auto":
        # not on a CPU: a network of 32 channels is several times slower in bf16 there, even where the hardware has it
        has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "fp32" if not (auto and cuda) else "bf16" if has_bf16 else "fp16"
    if train.channels_last != "auto":
        form = torch.channels_last if train.channels_last else torch.contiguous_format
    compiled = train.compile is True or (train.compile == "auto" and auto and cuda and steps >= COMPILE_FROM)
    if compiled and (fault := compile_fault(device)):
        if train.compile != "auto":
            raise UserError(f"params.yaml: train.compile = true: {fault}; or set it to false")
        print(f"train.compile = auto: not compiled: {fault}", flush=True)
        compiled = False
    chosen = [precision, "channels last" if form == torch.channels_last else "channels first"]
    print(f"training in {', '.join(chosen)}, {'' if compiled else 'not '}compiled", flush=True)
    return Kernels(precision, form, compiled)


def compile_fault(device: torch.device) -> str | None:
    """Why torch.compile would fail at the first step on this machine, and what to install; None if nothing is missing.

    On a GPU torch.compile needs Triton, and with it a C compiler, Python's headers and compute capability 7.0; on a CPU
    it needs a C++ compiler and Python's headers.
    """
    cuda = device.type == "cuda"
    variable, known = ("CC", ("gcc", "clang")) if cuda else ("CXX", ("g++",))  # where torch and Triton look
    asked = os.environ.get(variable)
    headers = Path(sysconfig.get_paths(scheme="posix_prefix")["include"], "Python.h")
    if cuda and find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if cuda and torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs a GPU of compute capability 7.0 or above"
    if not any(map(shutil.which, [asked] if asked else known)):
        where = f"{variable} = {asked!r} is not a program" if asked else f"{' or '.join(known)} is not installed"
        return f"{where}; apt-get install {'gcc' if cuda else 'g++'}"
    if not headers.exists():
        return f"{headers} is missing; apt-get install python3-dev, or use uv's or conda's Python"
    return None


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn an out-of-memory error of the block into one line that names the settings that help.

    Args:
        advice: the settings to change, as the end of the line "out of memory: ".

    Raises:
        UserError: in place of torch's own error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's more specific class covers only some of CUDA's errors
        specific = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not specific and not any(words in str(error) for words in NO_MEMORY):
            raise
        raise UserError(f"out of memory: {advice}") from None


def peak_memory(device: torch.device) -> float:
    """The peak of this process's memory so far, in GiB: on the GPU, or for a CPU in the machine's RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**10 if sys.platform == "linux" else 1  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
