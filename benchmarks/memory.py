"""What memory a training step takes: python -m benchmarks.memory

The project's own step under torch's FakeTensorMode, which computes shapes and no numbers, while each storage is counted
from its making to its end. So the table needs neither the memory nor the time, and no GPU. `--check` runs two of its
cells for real and compares their peak with the count.
"""

import argparse
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks import ours
from benchmarks.report import table
from benchmarks.workers import Contender, Send, alone

Precision = Literal["fp32", "bf16"]
GIB = 2**30
NETWORKS = {  # settings of conf/model, of a size each is used at
    ("paper", 32): [],
    ("paper", 64): ["model.channel_multipliers=[1,2,2,2]", "model.attention=[false,false,true,false]"],
    ("paper", 128): ["model.channel_multipliers=[1,1,2,2,4]", "model.attention=[false,false,false,true,false]"],
    ("paper", 256): ["model.channel_multipliers=[1,1,2,2,4,4]", "model.attention=[false,false,false,false,true,false]"],
}
BATCHES = (8, 128)
CARDS = (8, 16, 24, 80)  # GiB
OTHERS = 0.85  # of a card is left beside its context, the allocator's holes and the kernels' workspaces
CHECKED = [("paper", 32, 8, False), ("paper", 64, 4, True)]


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on.

    Attributes:
        now, most: bytes that are held, and the most that were held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, out)
        return out

    def _add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._remove, key, size)
        return tensor

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def steps(network: str, size: int, batch: int, checkpointing: bool, precision: Precision = "fp32") -> Iterator[None]:
    """A pause before the set-up, and one after each of two steps with Adam, an average and the weights themselves."""
    import torch

    from ddpm.core.ema import EMA
    from ddpm.core.noise_levels import Timesteps, timestep_shares
    from ddpm.runtime.device import Kernels
    from ddpm.training.setup import Setup, make_lr_schedule, make_optimizer
    from ddpm.training.step import optimizer_step

    p = ours.params(
        f"model={network}",
        "dataset=folder",
        f"dataset.image_size={size}",
        *NETWORKS[network, size],
        "optimizer=adam",
        "diffusion=linear",
        f"train.batch_size={batch}",
        f"train.precision={precision}",
        f"train.activation_checkpointing={checkpointing}",
        "train.ema_widths=[0.1]",
    )
    yield
    device = torch.device("cpu")
    model, diffusion = ours._network(p, size, 3).train(), ours._diffusion(p, device)
    model.set_recompute(checkpointing)
    optimizer = make_optimizer(p.optimizer, model)
    setup = Setup(  # as set_up makes it, whose .to() fake tensors refuse
        model=model,
        network=model,
        diffusion=diffusion,
        timesteps=Timesteps(timestep_shares(np.linspace(0.9999, 0.0001, diffusion.timesteps), "uniform", 1.0), device),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        schedule=make_lr_schedule(None, optimizer, 0, 10),
        kernels=Kernels(precision, torch.contiguous_format, False),
        device=device,
        total=10,
        per_epoch=1,
    )
    average = EMA(setup.model, 0.1)
    images, labels = torch.zeros(batch, 3, size, size, dtype=torch.uint8), torch.zeros(batch, dtype=torch.int64)
    for step in range(2):  # the optimizer's state is made in the first
        optimizer_step(setup, p.train, images, labels, step)
        average.update(step)
        yield


def counted(*cell: Any) -> float:
    """The peak of a cell, in GiB, by the count."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    run = steps(*cell)
    next(run)
    with FakeTensorMode(allow_non_fake_inputs=True), Peak() as peak:
        for _ in run:
            pass
    return peak.most / GIB


def real(send: Send, cell: list[Any]) -> None:
    """The peak of a cell beyond what the process held before, in GiB."""
    from pathlib import Path

    def held(what: str) -> float:
        return int(Path("/proc/self/status").read_text().partition(what)[2].split()[0]) / 2**20

    import torch

    run = steps(*cell)
    next(run)
    torch.optim.Adam([torch.zeros(1)])  # the first optimizer loads a hundred MiB of modules
    before = held("VmRSS:")
    send("ready")
    for _ in run:
        pass
    send(held("VmHWM:") - before)


def largest(gib: float, one: float, many: float) -> int:
    """The largest power of two as a batch that a card of so many GiB takes, from the peaks at the two BATCHES."""
    each = (many - one) / (BATCHES[1] - BATCHES[0])
    room = (gib * OTHERS - (one - BATCHES[0] * each)) / each
    return 2 ** (int(room).bit_length() - 1) if room >= 1 else 0


def page() -> str:
    """The table; each row is printed as it is known, for it takes minutes."""
    rows = []
    for network, size in NETWORKS:
        for precision in ("fp32", "bf16"):
            for checkpointing in (False, True):
                peaks = [counted(network, size, batch, checkpointing, precision) for batch in BATCHES]
                fits = (largest(card, *peaks) or "–" for card in CARDS)
                cells = (f"{network}, {size}x{size}", precision, "yes" if checkpointing else "no")
                rows.append((*cells, *(f"{peak:.1f}" for peak in peaks), *fits))
                print("  ", *rows[-1], flush=True)
    head = ("network", "precision", "checkpointing", *(f"GiB at batch {batch}" for batch in BATCHES))
    return table((*head, *(f"batch in {card} GiB" for card in CARDS)), rows)


def main() -> None:
    """Print the table, or check it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--check", action="store_true", help="run two cells for real: 4 GiB, a minute")
    if parser.parse_args().check:
        for cell in CHECKED:
            measured = alone(Contender("real", "benchmarks.memory:real", {"cell": list(cell)}))
            print(f"{cell}: counted {counted(*cell):.2f} GiB, measured {measured:.2f}")
    else:
        print(page())


if __name__ == "__main__":
    main()
