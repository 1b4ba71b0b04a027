"""The four stages one after the other, in their own folder, in this process."""

import ctypes
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from omegaconf import OmegaConf
from PIL import Image

from ddpm.config.load import check
from ddpm.errors import UserError
from ddpm.evaluation.card import rounded
from ddpm.runtime.resume import ResumeState
from stages import evaluate, prepare_data, sample, train
from tests.conftest import ROOT, composed
from tests.support.stages import STAGES, run
from tests.support.wandb_log import records, values

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which all four stages have run."""
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DVC_ROOT", raising=False)
        for stage in STAGES:
            run(stage)
    return folder


@pytest.fixture
def inside(made, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return made


def test_samples_are_pixels_of_the_shape_of_the_data(made):
    images = np.load(made / "samples/images.npy")
    assert images.shape == (64, 8, 8, 1)
    assert images.dtype == np.uint8
    assert images.max() > 200 > 50 > images.min()  # not left in [-1, 1], and spread over the range


def test_the_pictures_show_the_samples_and_their_denoising(made):
    grid = Image.open(made / "results/sample/grid.png")
    strip = Image.open(made / "results/sample/denoising.png")
    assert grid.size == (266, 266)  # 4 x 4 images of 64 pixels, with gaps of 2
    assert strip.size == (11 * 66 + 2, 6 * 66 + 2)
    first = np.asarray(grid)[2:66:8, 2:66:8]
    np.testing.assert_array_equal(first, np.load(made / "samples/images.npy")[0, ..., 0])


def test_a_sample_depends_neither_on_the_count_nor_on_the_batch(inside):
    before = np.load("samples/images.npy")
    run(sample, "sample.count=10", "sample.batch_size=3")
    after = np.load("samples/images.npy")
    run(sample)
    assert np.abs(before[:10].astype(int) - after).max() <= 1  # matrix products round by the size of the batch
    np.testing.assert_array_equal(np.load("samples/images.npy"), before)


@pytest.mark.parametrize("overrides", [("sample.seed=1",), ("sample=ddpm",), ("sample=ddim", "sample.eta=1.0")])
def test_seed_and_sampler_change_the_samples(inside, overrides):
    before = np.load("samples/images.npy")
    run(sample, *overrides)
    assert (np.load("samples/images.npy") != before).mean() > 0.1
    run(sample)


def test_the_pictures_show_the_same_images_whatever_the_batch(inside):
    names = ("grid.png", "denoising.png", "film.png")
    expected = {name: np.asarray(Image.open(f"results/sample/{name}")).astype(int) for name in names}
    for size in (1, 5):  # 5: the six images of the strip are in two batches
        run(sample, f"sample.batch_size={size}")
        for name, pixels in expected.items():
            np.testing.assert_allclose(np.asarray(Image.open(f"results/sample/{name}")), pixels, atol=2)
    run(sample)


def test_a_class_conditional_model_goes_through_all_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    conditional = ("model.class_conditional=true", "sample.guidance=2.0", "sample.classes=[3, 8]")
    for stage in STAGES:
        run(stage, *conditional)
    assert json.loads(Path("models/ddpm/classes.json").read_text()) == [str(i) for i in range(10)]
    assert (
        "| Classes | 3, 8; each as often as the others, whatever the data; guidance scale 2 |"
        in Path("results/evaluate/card.md").read_text()
    )
    metrics = json.loads(Path("results/evaluate/metrics.json").read_text())
    assert metrics["nfe"] == 20  # ten steps, with and without the label in each
    before = np.load("samples/images.npy")
    run(sample, *conditional[:2], "sample.classes=[8, 3]")
    assert (np.load("samples/images.npy") != before).mean() > 0.1


def test_a_conditional_model_of_data_without_classes_is_refused(inside, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inside / "data", "data")
    info = json.loads(Path("data/prepared/dataset.json").read_text())
    Path("data/prepared/dataset.json").write_text(json.dumps(info | {"classes": [], "class_counts": []}))
    with pytest.raises(UserError, match=r"model.class_conditional = True: the data has no classes"):
        run(train, "model.class_conditional=true")


class Killed(BaseException):
    """An exception that no handler catches, like SIGKILL."""


@pytest.mark.parametrize(
    ("stage", "folder", "parts"),
    [
        (sample, "samples", ["dpm_solver", "moments"]),
        (evaluate, "results/evaluate", ["bound", "held-out", "dpm_solver"]),
    ],
)
def test_a_stage_killed_again_and_again_ends_in_the_same_bytes(inside, monkeypatch, stage, folder, parts):
    overrides = ("sample.batch_size=20", "evaluate.batch_size=200", "evaluate.bound_images=2", "evaluate.seeds=2")
    run(stage, *overrides)
    files = {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    pictures = {path: path.read_bytes() for path in Path("results/sample").iterdir()}
    kept, original = [], ResumeState.kept

    def keep_one_and_die(self, name, compute):
        new = not (self.folder / f"{name}.npy").exists()
        array = original(self, name, compute)
        if new:
            kept.append(name)
            raise Killed
        return array

    for path in files:
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(ResumeState, "kept", keep_one_and_die)
        for _ in range(50):
            try:
                run(stage, *overrides)
                break
            except Killed:
                continue
    assert len(kept) == len(set(kept)) > 3  # no part was computed twice
    assert {part for part in parts if any(name.startswith(part) for name in kept)} == set(parts)
    assert {path: path.read_bytes() for path in files} == files
    assert {path: path.read_bytes() for path in pictures} == pictures
    assert not list(Path(".state").iterdir())
    run(sample)


def in_place():
    with Path("data/prepared/train/images.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x07")


def replaced():
    Path("data/prepared").rename("data/old")
    run(prepare_data, "dataset.subset=100")


@pytest.mark.parametrize(
    ("stage", "folder", "change"),
    [(train, "models", in_place), (train, "models", replaced), (evaluate, "results/evaluate", in_place)],
)
def test_data_changed_under_a_running_stage_writes_nothing(made, monkeypatch, tmp_path, stage, folder, change):
    def files():
        return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}

    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    before, enter = files(), ResumeState.__enter__
    with monkeypatch.context() as patch:
        patch.setattr(ResumeState, "__enter__", lambda self: (change(), enter(self))[1])
        with pytest.raises(UserError, match=r"^data/prepared: was changed while the .* ran, .*; run the stage again$"):
            run(stage, "train.steps=2", "train.warmup_steps=0", "evaluate.bound_images=0")
    assert files() == before
    assert not list(Path(".state").iterdir())
    if change is in_place:  # the data no longer matches dataset.json
        with pytest.raises(UserError, match=r"^data/prepared: does not match its dataset.json; "):
            run(stage)


def test_more_epochs_start_over_or_from_a_copy_of_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    weights = Path("models/ddpm/unet/diffusion_pytorch_model.safetensors")

    def trained(folder, epochs, *more):
        monkeypatch.chdir(tmp_path / folder)
        run(
            train,
            "train.steps=null",
            f"train.epochs={epochs}",
            "train.preview_every_epochs=0",
            "train.warmup_steps=1",
            *more,
        )
        return weights.read_bytes()

    for folder in ("raised", "untouched"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        run(prepare_data, "dataset.subset=128")  # two batches
    one = trained("raised", 1)
    shutil.copytree("models/ddpm", tmp_path / "base")
    assert trained("raised", 3) == trained("untouched", 3) != one
    assert trained("raised", 3, f"train.init_from={tmp_path / 'base'}") not in (one, trained("untouched", 3))
    assert "resuming" not in capsys.readouterr().out


def test_the_stages_record_into_one_run_of_wandb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for stage in STAGES:
        run(stage, "train.steps=12")
        wandb.teardown()  # as at the end of the stage's own process, which waits until all is written
    name = json.loads(Path("models/ddpm/training.json").read_text())["run"]
    runs = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert [folder.name.rpartition("-")[2] for folder in runs] == [name] * 3
    logs = [list(records(next(folder.glob("*.wandb")))) for folder in runs]
    rows = [
        {key for record in log if record.WhichOneof("record_type") == "history" for key in values(record.history.item)}
        for log in logs
    ]
    assert "train/loss" in rows[0]
    assert {"sample/grid.path", "sample/denoising.path"} <= rows[1]
    metrics = json.loads(Path("results/evaluate/metrics.json").read_text())
    assert {"evaluate/neighbours.path"} | {f"evaluate/{key}" for key in metrics} <= rows[2]


def test_samples_are_drawn_without_dropout(inside, monkeypatch):
    seen = []
    original = torch.nn.Dropout.forward
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: (seen.append(self.training), original(self, x))[1])
    run(sample)
    assert seen
    assert not any(seen)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_an_error_of_the_system(inside):
    before = (inside / "samples/images.npy").read_bytes()
    (inside / "samples/.images.npy.tmp").symlink_to("/dev/full")  # the file that is renamed at the end
    with pytest.raises(OSError, match="No space left") as fault:
        run(sample)
    assert fault.value.errno == errno.ENOSPC  # run_stage reports it in one line
    assert (inside / "samples/images.npy").read_bytes() == before


LIMITED = """
import contextlib, io, json, os, resource, sys
from ddpm.runtime.stage import run_stage
from stages import evaluate, prepare_data, sample, train

def report_of(stage):
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        try:
            run_stage(stage.main, stage.SECTIONS)
            code = 0
        except SystemExit as end:
            code = end.code
    return code, [line for line in errors.getvalue().splitlines() if line.startswith(("error", "Traceback"))]

results = []
for stage, folder in json.loads(sys.argv[1]):
    os.chmod(folder, 0o555)
    results.append(report_of(globals()[stage]))
    os.chmod(folder, 0o755)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for stage, size in json.loads(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    results.append(report_of(globals()[stage]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
print(json.dumps(results))
"""


def without_power_over_files():
    """Drop the capabilities by which root reads and writes anything, so that folders are read-only for root, too."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="root is bound by Linux's capabilities")
def test_read_only_folders_and_full_disks_give_one_line(made, tmp_path):
    here = tmp_path / "here"
    shutil.copytree(made, here)
    few = (
        "train.steps=4",
        "train.warmup_steps=1",
        "train.save_every_seconds=1e-9",
        "train.preview_every_epochs=0",
        "sample.steps=2",
        "evaluate.bound_images=0",
    )
    (here / "params.yaml").write_text(OmegaConf.to_yaml(composed("+experiment=smoke", "runtime.threads=1", *few)))
    before = {path: path.read_bytes() for name in ("data", "models") for path in (here / name).rglob("*.*")}
    for path in [*here.glob("results/sample/*"), *here.glob("results/evaluate/*")]:
        path.unlink()  # as dvc does
    (here / ".state").mkdir(exist_ok=True)
    read_only = {"prepare_data": "data", "train": ".state", "sample": "results/sample", "evaluate": "results/evaluate"}
    too_large = {"prepare_data": 5_000, "train": 50_000, "sample": 2_000}  # bytes: less than the largest file
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps([*read_only.items()]), json.dumps([*too_large.items()])],
        cwd=here,
        env={name: value for name, value in os.environ.items() if name != "DVC_ROOT"} | {"PYTHONPATH": str(ROOT)},
        preexec_fn=without_power_over_files,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for (code, lines), reason in zip(results, ["Permission denied"] * 4 + ["File too large"] * 3, strict=True):
        (line,) = lines
        assert (code, re.fullmatch(rf"error: .+: {reason}", line) is not None) == (1, True), line
    assert {path: path.read_bytes() for path in before} == before
    assert not list(here.rglob("*.tmp"))


def test_metrics_are_rounded_and_name_their_reference(made):
    metrics = json.loads((made / "results/evaluate/metrics.json").read_text())
    assert metrics["samples"] == 64
    assert metrics["reference_images"] == 1797
    assert 0 < metrics["frechet_distance_floor"] < metrics["frechet_distance"]
    assert metrics == rounded(metrics)
    rows = json.loads((made / "results/evaluate/loss_by_timestep.json").read_text())
    assert [row["timestep"] for row in rows] == [10, 30, 50, 70, 90]
    assert metrics["held_out_loss"] == pytest.approx(
        np.mean([row["loss"] for row in rows]), abs=metrics["held_out_loss_se"] / 10
    )


@pytest.mark.parametrize("reference", ["train", "test"])
def test_the_reference_set_is_the_one_in_the_parameters(inside, reference):
    run(evaluate, f"evaluate.reference={reference}")
    metrics = json.loads((inside / "results/evaluate/metrics.json").read_text())
    assert metrics["reference_images"] == {"train": 1438, "test": 359}[reference]


def test_the_same_run_gives_the_same_bytes(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    torch.manual_seed(123)
    for stage in STAGES:
        run(stage)
    run(evaluate)
    names = [path.relative_to(tmp_path) for path in tmp_path.glob("*/**/*") if path.is_file()]
    assert len(names) > 20
    for name in names:
        if name.parts[0] != ".cache" and name.parts[1] != "evaluate":
            assert (tmp_path / name).read_bytes() == (made / name).read_bytes(), name


def test_the_curves_and_pictures_of_the_training_are_kept(made):
    assert {path.name for path in (made / "results/train/pictures").iterdir()} == {
        "inputs.png",
        "noise.png",
        "samples_epoch_00001.png",
    }
    for name in ("loss", "learning_rate", "grad_norm"):
        lines = (made / f"results/train/plots/metrics/{name}.tsv").read_text().splitlines()
        assert lines[0] == f"step\t{name}"
        assert [line.split("\t")[0] for line in lines[1:]] == ["10", "20", "24"]


@pytest.mark.parametrize("stage", [train, sample, evaluate])
def test_a_stage_without_its_inputs_says_which_stage_to_run(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as fault:
        run(stage)
    assert "\n" not in str(fault.value)


def test_more_steps_than_the_model_has_timesteps_are_refused(inside):
    params = check(composed("+experiment=smoke", "diffusion.timesteps=200", "sample.steps=150"))
    with pytest.raises(UserError, match=r"sample.steps = 150: .*100,"):
        sample.main(SimpleNamespace(runtime=params.runtime, sample=params.sample, tracking=params.tracking))
