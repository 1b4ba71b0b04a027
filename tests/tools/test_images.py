"""`make images`: the samples of a revision as PNG files, all or some of them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import composed
from tools import images

CONDITIONAL = {"model.class_conditional": "true", "sample.guidance": "2.0"}


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Six samples of an unconditional model in the working tree."""
    monkeypatch.chdir(tmp_path)
    for folder in ("samples", "models/ddpm"):
        Path(folder).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    np.save("samples/images.npy", pixels)
    Path("models/ddpm/training.json").write_text("{}")
    return pixels


def with_classes() -> None:
    Path("models/ddpm/classes.json").write_text(json.dumps(["T-shirt/top", "dog"]))
    Path("params.yaml").write_text(json.dumps(composed(*(f"{key}={value}" for key, value in CONDITIONAL.items()))))


def written(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["images", *arguments, "--out", "out"])
    images.main()
    return sorted(path.name for path in Path("out").iterdir())


def test_every_sample_is_written_pixel_for_pixel(samples, monkeypatch):
    assert written(monkeypatch) == [f"0000{i}.png" for i in range(6)]
    for i, pixels in enumerate(samples):
        with Image.open(f"out/0000{i}.png") as picture:
            assert np.array_equal(np.asarray(picture), pixels[..., 0])


def test_only_the_requested_samples_are_written(samples, monkeypatch):
    assert written(monkeypatch, "--only", "5 0-1") == ["00000.png", "00001.png", "00005.png"]


def test_files_are_named_after_the_classes_that_the_samples_have(samples, monkeypatch):
    with_classes()
    names = ["T-shirt-top", "dog"]
    assert written(monkeypatch) == [f"0000{i}_{names[i % 2]}.png" for i in range(6)]


def test_samples_of_a_class_can_be_requested(samples, monkeypatch):
    with_classes()
    assert written(monkeypatch, "--classes", "dog", "--only", "0-3") == ["00001_dog.png", "00003_dog.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "6"], "ONLY = 6: 6 is beyond the 6 samples, 0 to 5"),
        (["--only", "3-1"], "3-1 is neither a number nor a range"),
        (["--only", "-1"], "-1 is neither a number nor a range"),
        (["--classes", "dog"], "CLASS = dog: no sample has this class; the model is unconditional"),
    ],
)
def test_a_missing_sample_or_class_is_refused_in_one_line(samples, monkeypatch, arguments, words):
    arguments = [f"{arguments[0]}={arguments[1]}"]
    with pytest.raises(SystemExit) as stop:
        written(monkeypatch, *arguments)
    assert words in str(stop.value) and "\n" not in str(stop.value)
    assert not Path("out").exists()


def test_a_folder_with_files_of_another_run_is_refused(samples, monkeypatch):
    written(monkeypatch)
    with pytest.raises(SystemExit, match="OUT = out: exists already"):
        written(monkeypatch)
