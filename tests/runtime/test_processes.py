"""Several processes give what one gives, and end together: stages under a real torchrun, with gloo."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
from omegaconf import OmegaConf

from ddpm.config.schema import Runtime
from ddpm.errors import UserError
from ddpm.files import write_file
from ddpm.runtime import processes
from stages import evaluate, prepare_data, sample, train
from tests.conftest import ROOT, composed
from tests.support.stages import SETTINGS
from tests.support.stages import run as run_here

pytestmark = pytest.mark.process

SEVERAL = ("runtime.launcher=torchrun", "runtime.processes=2")
TRAINING = (
    "train.steps=12",
    "train.batch_size=16",
    "train.log_every_steps=1",
    "train.preview_every_epochs=0",
    "train.flip=true",
    "sample.batch_size=8",
    "sample.count=24",
    "sample.steps=4",
    "evaluate.batch_size=100",
    "evaluate.loss_images=200",
    "evaluate.bound_images=0",
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prepared data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    run_here(prepare_data)
    return tmp_path


def start(folder: Path, stage: str, *overrides: str, script: bool = False, **variables: str) -> subprocess.Popen[str]:
    # whole at once: another machine may be reading it
    write_file(folder / "params.yaml", OmegaConf.to_yaml(composed(*SETTINGS, *TRAINING, *overrides)).encode())
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, *([f"{ROOT}/stages/{stage}.py"] if script else ["-m", f"stages.{stage}"])]
    alone = "DVC_STAGE" not in variables  # dvc and its stages are in one group
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=alone
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == code, out
    assert "Traceback" not in out, out
    return out


def loss_file(folder: Path) -> Path:
    return folder / "results/train/plots/metrics/loss.tsv"


def loss_curve(folder: Path) -> np.ndarray:
    return np.loadtxt(loss_file(folder), skiprows=1)[:, 1]


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)


def test_two_processes_have_the_curve_samples_and_metrics_of_one(place):
    """The same global batch. Sums are made in another order, so the loss agrees to rounding."""
    run_here(train, *TRAINING)
    one = loss_curve(place)
    out = finish(start(place, "train", *SEVERAL, script=True))  # python stages/train.py, as python -m stages.train
    assert "one of 2 processes" in out and out.count("device: ") == 1  # one process prints
    np.testing.assert_allclose(loss_curve(place), one, rtol=1e-4)
    made = {}
    for several in ((), SEVERAL):  # from the same model
        for stage in (sample, evaluate):
            if several:
                finish(start(place, stage.__name__.rpartition(".")[2], *several))
            else:
                run_here(stage, *TRAINING)
        results = sorted((place / "results").glob("[es]*/*.*"))
        assert len(results) == 9
        made[several] = [(place / "samples/images.npy").read_bytes(), *(path.read_bytes() for path in results)]
    assert made[()] == made[SEVERAL]  # each batch is computed by one process, as it is by one alone
    assert not list((place / ".state").iterdir())


@pytest.mark.slow  # a minute each
@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("SIGKILL", 1, "process 1 of the run was ended by SIGKILL"),
        ("SIGTERM", 143, "stopped by SIGTERM"),
    ],
)
def test_a_run_with_a_killed_process_resumes_in_the_same_bytes(place, name, code, line):
    long = (*SEVERAL, "train.steps=24", "train.save_every_seconds=1e-9")
    curve, weights = loss_file(place), place / "models/ddpm/unet/diffusion_pytorch_model.safetensors"
    finish(start(place, "train", *long))
    untouched = weights.read_bytes()
    curve.unlink()

    process = start(place, "train", *long)
    until(lambda: curve.exists() and curve.read_text().count("\n") > 3)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    began = time.monotonic()
    victim = workers[1] if name == "SIGKILL" else psutil.Process(process.pid)
    victim.send_signal(signal.Signals[name])
    assert line in finish(process, code)
    assert time.monotonic() - began < 20
    assert not [worker for worker in workers if worker.is_running()]

    assert "resuming at step" in finish(start(place, "train", *long))
    assert weights.read_bytes() == untouched


def on_two_machines(place: Path, *overrides: str) -> str:
    """What the README's Slurm example does: dvc's on one machine, a bare stage on the other, both set by PET_*."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    meeting = {"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": endpoint, "PET_RDZV_ID": "job"}
    first = start(place, "train", *overrides, DVC_STAGE="train", **meeting)
    second = start(place, "train", *overrides, **meeting)
    return finish(first) + finish(second)


@pytest.mark.slow
def test_two_machines_train_as_one(place):
    assert on_two_machines(place, "runtime.launcher=torchrun", "runtime.processes=1").count("one of 2 processes") == 1
    assert len(loss_curve(place)) == 12


@pytest.mark.slow
def test_a_run_of_one_machine_resumes_on_two_with_the_same_curve(place):
    one = ("runtime.launcher=torchrun", "runtime.processes=1", "train.steps=40", "train.save_every_seconds=1e-9")
    finish(start(place, "train", *one))
    untouched = loss_curve(place)
    loss_file(place).unlink()

    process = start(place, "train", *one)
    until(lambda: loss_file(place).exists() and loss_file(place).read_text().count("\n") > 3)
    process.terminate()
    assert "stopped by SIGTERM" in finish(process, 143)

    out = on_two_machines(place, *one)
    assert out.count("one of 2 processes") == out.count("resuming at step") == 1
    assert len(untouched) == 40
    np.testing.assert_allclose(loss_curve(place), untouched, rtol=1e-4)


LOST = "another process of the run has ended"


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (dist.DistBackendError("NCCL error:\n system error"), "NCCL failed: NCCL error: system error"),
        (dist.DistNetworkError("Connection reset by peer"), LOST),
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), LOST),
    ],
    ids=["NCCL", "network", "gloo"],
)
def test_a_fault_between_processes_ends_in_one_line(monkeypatch, error, what):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(processes, "join", lambda: None)
    with pytest.raises(UserError) as caught, processes.as_worker():
        raise error
    assert str(caught.value) == f"process 0: {what}; run the same command to resume"


@pytest.mark.parametrize(("gpus_here", "count", "noted"), [(1, 2, True), (2, 2, False), (0, 2, False)])
def test_more_processes_than_gpus_are_noted_in_one_line(monkeypatch, capsys, gpus_here, count, noted):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus_here)
    monkeypatch.setattr(processes.gpus, "take", lambda *_: [])
    monkeypatch.setattr(processes.gpus, "names", lambda: [])
    monkeypatch.setattr(torch.distributed.run, "run", lambda _: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("sys.argv", ["stages/train.py"])
    processes.launch(Runtime(**composed()["runtime"] | {"launcher": "torchrun", "processes": count}))
    line = (
        "runtime.processes = 2: more than this machine's 1 GPU; processes that share a GPU are slower than "
        "one process per GPU\n"
    )
    assert capsys.readouterr().out == line * noted


@pytest.mark.parametrize(
    ("gpus_here", "others", "backend"),
    [(0, "False", "gloo"), (1, "True", "gloo"), (2, "True", "cpu:gloo,cuda:nccl"), (2, "False", "gloo")],
)
def test_all_use_nccl_or_none_where_some_share_a_gpu(monkeypatch, gpus_here, others, backend):
    asked, store = [], dist.HashStore()
    store.set("gpu_each_1", others)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus_here)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda kind, **_: asked.append(kind))
    monkeypatch.setattr(processes, "_joined", False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    processes.join()
    assert asked == [backend]


def test_a_batch_must_divide_among_the_processes(place):
    out = finish(start(place, "train", *SEVERAL, "train.batch_size=9"), 1)
    assert "train.batch_size = 9: must be a multiple of train.accumulation = 1 x runtime.processes = 2" in out
