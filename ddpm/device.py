"""The device that a stage computes on, and how exact its kernels are."""

import torch

from ddpm.config import Runtime
from ddpm.errors import UserError


def choose_device(runtime: Runtime) -> torch.device:
    """Pick the device, set torch's exactness for it, and say on the terminal what was chosen.

    Raises:
        UserError: `cuda` was asked for and is not there.
    """
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise UserError("params.yaml: runtime.device = 'cuda': this machine has none; use auto or cpu")
    if runtime.threads is not None:
        # Kernels split their sums by the number of threads: the bytes follow from it, not from the cores there are
        torch.set_num_threads(runtime.threads)
    device = torch.device("cuda" if runtime.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.use_deterministic_algorithms(runtime.reproducible)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # (filling costs time, and only hides a read of memory that was never written)
    torch.backends.cudnn.benchmark = not runtime.reproducible
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not runtime.reproducible
    cpu = f"CPU, {torch.get_num_threads()} threads"
    name = cpu if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"device: {name}; {'reproducible' if runtime.reproducible else 'fastest'} kernels", flush=True)
    return device
