"""The stage train with loader workers, as dvc runs it: a fault or signal in any process ends in one line."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from stages import prepare_data
from tests.conftest import ROOT, composed
from tests.support.stages import run

pytestmark = pytest.mark.process
FLIP = "{_target_: torchvision.transforms.v2.RandomHorizontalFlip}"
CROP = "{_target_: torchvision.transforms.v2.RandomCrop, size: 64}"
RARELY = f"{{_target_: torchvision.transforms.v2.RandomApply, p: 0.003, transforms: [{CROP}]}}"  # a probe misses it


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prepared data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    run(prepare_data)
    return tmp_path


def started(folder: Path, transform: str) -> subprocess.Popen[str]:
    """The stage with two workers, in its own process group, as a terminal starts it; it trains for minutes."""
    settings = ("+experiment=smoke", "runtime.threads=1", "train.steps=20000", "train.workers=2")
    tree = composed(*settings, f"train.transforms=[{transform}]")
    (folder / "params.yaml").write_text(OmegaConf.to_yaml(tree))
    return subprocess.Popen(
        [sys.executable, "-m", "stages.train"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until_it_trains(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    while not process.stdout.readline().startswith("first step"):
        assert process.poll() is None
    time.sleep(0.5)


def errors_of(process: subprocess.Popen[str]) -> list[str]:
    """The lines on the stage's stderr, without those of progress."""
    _, errors = process.communicate(timeout=60)
    return [line for line in errors.splitlines() if not line.startswith("train: ")]


def test_a_transform_that_fails_in_a_worker_is_one_line(place: Path) -> None:
    process = started(place, RARELY)
    (line,) = errors_of(process)
    assert process.returncode == 1
    assert line.startswith(
        "error: params.yaml: train.transforms.0 (RandomApply): Required crop size (64, 64) is larger"
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_and_ends_in_one_line(place: Path, signum: signal.Signals) -> None:
    process = started(place, FLIP)
    until_it_trains(process)
    os.killpg(process.pid, signum)  # as Ctrl-C in a terminal does
    (line,) = errors_of(process)
    assert (process.returncode, line) == (128 + signum, f"stopped by {signum.name}; run the same command to resume")
    assert list(place.glob(".state/train-*/state.pt"))


def test_a_worker_that_is_killed_ends_the_training_in_one_line(place: Path) -> None:
    process = started(place, FLIP)
    until_it_trains(process)
    psutil.Process(process.pid).children()[0].kill()  # as the kernel does when memory runs out
    (line,) = errors_of(process)
    assert process.returncode == 1
    # torch has two sentences: its signal handler's or its queue's, whichever notices first
    noticed = r"DataLoader worker \(pid(\(s\))? \d+\) (is killed by signal: Killed|exited unexpectedly)"
    assert re.match(rf"error: params.yaml: train.workers = 2: {noticed}; lower it, or free memory", line)


def test_a_fault_beside_the_data_is_reported_before_any_write(place: Path) -> None:
    tree = composed("+experiment=smoke", f"train.transforms=[{CROP}]")
    (place / "params.yaml").write_text(OmegaConf.to_yaml(tree))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.train"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: params.yaml: train.transforms.0 (RandomCrop): Required crop size (64, 64) is "
    )
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in place.iterdir()) == ["data", "params.yaml"]


def test_a_start_loads_neither_the_compiler_nor_scipy(place: Path) -> None:
    code = (
        "import sys; from stages import train; from tests.support.stages import run; run(train); "
        "print([name for name in ('torch._dynamo', 'scipy.optimize') if name in sys.modules])"  # 2 s
    )
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
