"""Faults of a setting given other settings, files or the data: one line each, in the first stage that runs."""

import subprocess
import sys

import pytest

from ddpm.config.checks import check_data, steps_per_epoch
from ddpm.config.load import check
from ddpm.errors import UserError
from tests.conftest import ROOT, composed

INFO = {"shape": [8, 8, 1], "counts": {"train": 130, "test": 20}, "classes": ["cat", "dog"]}
EPOCHS = ("train.steps=null", "train.epochs=2")


def faults(*overrides, **changes):
    with pytest.raises(UserError) as caught:
        check_data(check(composed(*overrides)), INFO | changes)
    return str(caught.value).split("\n")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("train.steps=99",), "train.warmup_steps = 100: longer than the training, train.steps = 99; a tenth of it is"),
        (("train.accumulation=3",), "train.batch_size = 64: must be a multiple of train.accumulation = 3"),
        (
            ("runtime.launcher=torchrun", "runtime.processes=3", "train.accumulation=2"),
            "train.batch_size = 64: must be a multiple of train.accumulation = 2 x runtime.processes = 3",
        ),
        (("train.init_from=no/where",), "train.init_from = 'no/where': there is no such folder; give a copy of"),
        (("train.init_from=conf",), "train.init_from = 'conf': is not a model folder: holds no unet/config.json; give"),
        (("train.init_from=models/ddpm",), "train.init_from = 'models/ddpm': is removed before each training; start"),
        (("train.init_from=./models/../models/ddpm",), "is removed before each training"),
        (
            ("evaluate=inception", "evaluate.weights=no.pth"),
            "evaluate.weights = 'no.pth': there is no such file; give the file weights-inception-2015-12-05",
        ),
    ],
)
def test_every_stage_refuses_faults_that_need_no_data(overrides, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        check(composed(*overrides))
    assert line in str(caught.value)
    assert len(str(caught.value).split("\n")) == 1


def test_existing_files_and_fitting_settings_are_allowed(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").touch()
    (tmp_path / "weights.pth").write_bytes(b"PK")
    check(composed("evaluate=inception", f"evaluate.weights={tmp_path}/weights.pth"))
    check(composed(f"train.init_from={tmp_path}"))
    check(composed(f"train.init_from={tmp_path}/unet"))  # flat, like the first models for diffusers
    check(composed("train.steps=100"))
    check(composed("runtime.launcher=torchrun", "runtime.processes=2", "train.accumulation=2"))
    check_data(check(composed(*EPOCHS, "train.warmup_steps=4")), INFO)
    check_data(check(composed("model.class_conditional=true", "sample.classes=[dog]")), INFO)
    check_data(check(composed()), INFO | {"classes": []})


def test_a_warm_up_longer_than_the_epochs_is_refused():
    line = "params.yaml: train.warmup_steps = 5: longer than the training: train.epochs = 2 of 2 steps each; a tenth of"
    assert faults(*EPOCHS, "train.warmup_steps=5")[0].startswith(line)
    small = {"counts": {"train": 5, "test": 1}}  # smaller than a batch: one step per epoch
    assert "train.epochs = 2 of 1 steps each" in faults(*EPOCHS, "train.warmup_steps=5", **small)[0]


def test_all_faults_that_depend_on_data_are_reported_at_once():
    lines = faults(
        *EPOCHS,
        "train.warmup_steps=9",
        "model.class_conditional=true",
        "sample.classes=[dog,cta,3]",
        "train.batch_size=99",
    )
    assert [line.split(": ")[1].split(" = ")[0] for line in lines] == ["train.warmup_steps", *["sample.classes"] * 2]
    assert lines[1].endswith("'cta' is not a class of the data (did you mean cat?); known: cat, dog")
    assert lines[2].endswith("'3' is not a class of the data; known: cat, dog")


def test_a_conditional_network_needs_classes():
    (line,) = faults("model.class_conditional=true", "sample.classes=[dog]", classes=[])
    assert line.startswith("params.yaml: model.class_conditional = True: the data has no classes; put the images of")


def test_classes_with_hostile_or_many_names_stay_on_one_line():
    (line,) = faults("model.class_conditional=true", "sample.classes=[cat]", classes=["c\x1b[2J\nat"] * 1000)
    assert line.isprintable()
    assert len(line) < 1500


@pytest.mark.parametrize(("images", "batch", "steps"), [(1438, 64, 22), (64, 64, 1), (63, 64, 1), (1, 64, 1)])
def test_an_epoch_has_whole_batches_and_at_least_one(images, batch, steps):
    assert steps_per_epoch(images, batch) == steps


def test_checking_imports_neither_torch_nor_numpy():
    code = "import sys, ddpm.config.checks; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
