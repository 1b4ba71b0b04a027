"""The stage prepare_data as dvc runs it: a process in a folder with params.yaml."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from ddpm.config.schema import Dataset
from stages import prepare_data
from tests.conftest import ROOT, composed

pytestmark = pytest.mark.process

DIGITS: dict[str, Any] = {
    "name": "digits",
    "path": "requirements.txt",
    "image_size": 8,
    "channels": 1,
    "test_fraction": 0.2,
    "subset": 20,
}


PROGRAM = [sys.executable, "-m", "stages.prepare_data"]


def write_params(folder: Path, *overrides: str, **changes: Any) -> None:
    """params.yaml, with changes to the settings of the data and Hydra's overrides of any other."""
    tree = composed(*overrides)
    (folder / "params.yaml").write_text(OmegaConf.to_yaml(tree | {"dataset": DIGITS | changes}))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def test_the_stage_writes_the_prepared_data_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path)
    prepare_data.main(SimpleNamespace(dataset=Dataset(**DIGITS)))
    printed = capsys.readouterr().out
    assert printed == "digits: 20 train and 20 test images of 8x8x1, 10 classes, in data/prepared\n"
    assert np.load("data/prepared/train/images.npy").shape == (20, 8, 8, 1)
    assert names(Path("data/prepared")) == ["dataset.json", "test", "train"]
    assert names(Path("data")) == ["prepared"]


def test_the_stage_uses_its_section_only() -> None:
    assert prepare_data.SECTIONS == ("dataset",)


def test_importing_the_stage_is_light() -> None:
    code = "import sys, stages.prepare_data; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), cwd=ROOT)


def test_a_wrong_parameter_is_reported_in_two_seconds(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("dataset:\n  name: digitz\n")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "stages.prepare_data"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1 and time.monotonic() - start < 5  # 2 s on an idle machine
    assert "error: params.yaml: dataset.name = 'digitz'" in done.stderr and "Traceback" not in done.stderr
    assert names(tmp_path) == ["params.yaml"]


def test_a_fault_is_reported_without_a_traceback(tmp_path: Path) -> None:
    write_params(tmp_path, name="folder", path="raw", on_broken="stop", max_megapixels=179)
    done = subprocess.run(PROGRAM, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: dataset.path = raw: there is no such folder") and done.stderr.count("\n") == 1


CROP = "train.transforms=[{_target_: torchvision.transforms.v2.RandomCrop, size: 64}]"
EPOCH = ("train.steps=null", "train.epochs=1")


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        ((CROP,), ["train.transforms.0 (RandomCrop): Required crop size (64, 64) is larger than input image size"]),
        (("train.transforms=[{_target_: torchvision.transforms.v2.ConvertImageDtype, dtype: torch.float64}]",),
         ["train.transforms: gives images of float64"]),
        (("model.class_conditional=true", "sample.classes=[3, x]", *EPOCH, "train.warmup_steps=2"),
         ["train.warmup_steps = 2: longer than the training", "sample.classes = [3, 'x']: 'x' is not a class of"]),
        (("train.steps=99",), ["train.warmup_steps = 100: longer than the training"]),
        (("train.init_from=nowhere", "evaluate=inception", "evaluate.weights=none.pth"),
         ["evaluate.weights = 'none.pth': there is no such file", "train.init_from = 'nowhere': there"]),
    ],
)  # fmt: skip
def test_faults_of_later_stages_are_reported_by_the_first(
    tmp_path: Path, overrides: tuple[str, ...], lines: list[str]
) -> None:
    write_params(tmp_path, *overrides)
    (tmp_path / "data/prepared").mkdir(parents=True)
    (tmp_path / "data/prepared/old").touch()
    done = subprocess.run(PROGRAM, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    printed = done.stderr.splitlines()
    for line, start in zip(printed, lines, strict=True):
        assert line.startswith(f"error: params.yaml: {start}")
    assert names(tmp_path / "data") == ["prepared"]
    assert names(tmp_path / "data/prepared") == ["old"]


@pytest.fixture
def many_large_images(tmp_path: Path) -> Path:
    """Enough work for half a minute or more: 3,000 links to one large image."""
    for split in ("train", "test"):
        (tmp_path / "raw" / split).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "raw/train/a.png", compress_level=1)
    os.link(tmp_path / "raw/train/a.png", tmp_path / "raw/test/a.png")
    for i in range(3000):
        os.link(tmp_path / "raw/train/a.png", tmp_path / f"raw/train/{i}.png")
    (tmp_path / "data/prepared").mkdir(parents=True)
    (tmp_path / "data/prepared/old").touch()
    return tmp_path


def descendants(pid: int) -> list[int]:
    try:
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in task.joinpath("children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [*children, *(pid for child in children for pid in descendants(child))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def started(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """The stage at work on the images of `folder`, and its processes once it decodes."""
    write_params(folder, name="folder", path="raw", on_broken="stop", max_megapixels=179, channels=3, subset=None)
    process = subprocess.Popen(
        PROGRAM,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (folder / "data/prepared.tmp/new/train/images.npy").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    return process, descendants(process.pid)


def gone(processes: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, processes))


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")


@needs_proc
def test_ctrl_c_ends_the_stage_at_once_and_leaves_the_old_data(many_large_images: Path) -> None:
    process, workers = started(many_large_images)
    assert workers
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole group
    _, err = process.communicate(timeout=15)
    assert process.returncode == 128 + signal.SIGINT
    assert err.splitlines()[-1] == "stopped by SIGINT; run the same command to resume"
    assert "Traceback" not in err and gone(workers, 5)
    assert names(many_large_images / "data") == ["prepared"]
    assert names(many_large_images / "data/prepared") == ["old"]


@needs_proc
def test_no_worker_outlives_a_killed_stage(many_large_images: Path) -> None:
    process, workers = started(many_large_images)
    assert workers
    process.kill()
    process.communicate(timeout=15)
    assert gone(workers, 10)
    assert names(many_large_images / "data/prepared") == ["old"]
