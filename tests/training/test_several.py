"""One step of two processes: who exchanges gradients when, and that all of them scale their loss alike."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import ROOT

pytestmark = pytest.mark.process


def worker() -> None:
    """As one of two processes: print what happened as JSON."""
    from ddpm.config.load import check
    from ddpm.core.diffusion import DiffusionConfig
    from ddpm.runtime import processes
    from ddpm.training import setup as setup_module
    from ddpm.training.step import optimizer_step
    from tests.conftest import composed, small_unet

    processes.join()
    compiled = torch.compile
    setup_module.torch.compile = lambda network: compiled(network, backend="eager")  # the graph, without its kernels
    setup_module.choose_kernels = lambda *_: kernels
    seen: dict[str, list] = {"exchanges": [], "scales": []}
    sums: list[int] = []

    def count(_: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sums.append(bucket.index())
        future = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    config = small_unet(block_out_channels=(8,), attention=(False,)).config
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    params = check(composed("train.batch_size=8", "train.accumulation=2"))
    for precision, compile_, steps in (("fp16", False, 2), ("fp32", True, 1)):
        kernels = setup_module.Kernels(precision, torch.contiguous_format, compile_)
        design = setup_module.Design(config, DiffusionConfig(50, "cosine", "v"), ())
        ready = setup_module.set_up(params, design, torch.device("cpu"), 40)
        network = getattr(ready.network, "_orig_mod", ready.network)
        assert isinstance(network, DistributedDataParallel)
        network.register_comm_hook(None, count)
        for step in range(steps):
            sums.clear()
            if precision == "fp16" and step == 1 and processes.rank() == 1:  # a gradient of this process overflows
                ready.model.conv_out.bias.register_hook(lambda gradient: gradient * float("inf"))
            optimizer_step(ready, params.train, images, labels, step)
            seen["exchanges"].append(len(sums) // (max(sums) + 1))
            if precision == "fp16":
                seen["scales"].append(ready.scaler.get_scale())
    os.write(1, (json.dumps(seen) + "\n").encode())


def test_gradients_are_exchanged_once_a_step_and_scales_agree():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from tests.training.test_several import worker; worker()"]
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": rank, "LOCAL_RANK": rank}, cwd=ROOT, stdout=-1, text=True)
        for rank in "01"
    ]
    answers = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in ranks]
    assert answers[0] == answers[1]
    assert answers[0] == {"exchanges": [1] * 3, "scales": [2.0**16, 2.0**15]}
