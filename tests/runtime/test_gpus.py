"""Each run on a machine has GPUs of its own. The devices of these tests are names: no GPU is needed."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm.runtime.gpus import take, visible
from tests.conftest import ROOT

TAKE = """
import sys
from pathlib import Path
from ddpm.runtime.gpus import take
print(*take(sys.argv[3:], int(sys.argv[2]), Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


class Machine:
    """Three GPUs, and the runs that take some."""

    def __init__(self, locks: Path) -> None:
        self.locks, self.runs = locks, []

    def run(self, count: int = 1) -> subprocess.Popen:
        command = [sys.executable, "-c", TAKE, str(self.locks), str(count), "GPU-a", "GPU-b", "GPU-c"]
        pipe = subprocess.PIPE
        run = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.runs.append(run)
        return run


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for run in made.runs:
        run.kill()
        run.communicate()


@pytest.mark.process
def test_each_run_has_a_gpu_of_its_own_and_one_too_many_waits(machine):
    runs = [machine.run() for _ in range(3)]
    assert sorted(run.stdout.readline() for run in runs) == ["0\n", "1\n", "2\n"]
    fourth = machine.run()
    assert fourth.stderr.readline() == "waiting for 1 of 3 GPUs, which other runs hold\n"
    runs[1].kill()  # the kernel frees the lock, however a run ends
    freed = runs[1].wait() and fourth.stdout.readline()
    assert freed in ("0\n", "1\n", "2\n")


@pytest.mark.process
def test_a_run_of_several_processes_takes_all_its_gpus_or_none(machine):
    first = machine.run(2)
    assert first.stdout.readline() == "0 1\n"
    second = machine.run(2)
    assert second.stderr.readline() == "waiting for 2 of 3 GPUs, which other runs hold\n"
    third = machine.run(1)
    assert third.stdout.readline() == "2\n", "a waiting run holds none"


def test_asking_for_more_gpus_than_there_are_takes_all(tmp_path):
    assert take(["GPU-x"], 4, tmp_path) == [0]
    assert take([], 1, tmp_path) == []


@pytest.mark.parametrize(
    ("places", "present", "expected"),
    [([0, 2], None, "0,2"), ([1], "4,7", "7"), ([0, 1], "GPU-a,GPU-b", "GPU-a,GPU-b")],
)
def test_processes_see_the_devices_that_were_taken(places, present, expected):
    assert visible(places, present) == expected
