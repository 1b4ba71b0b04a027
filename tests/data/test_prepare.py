"""A data set becomes the same prepared data each time, or is refused in one clear line per fault."""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm.config.schema import Dataset
from ddpm.data import decode
from ddpm.data import prepare as preparation
from ddpm.data.prepare import prepare
from ddpm.data.splits import subset_indices
from ddpm.errors import UserError
from ddpm.runtime import pool

pytestmark = pytest.mark.process  # files are read in a pool of processes
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _in_a_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def dataset(**changes: Any) -> Dataset:
    values: dict[str, Any] = {"name": "folder", "path": "raw", "image_size": 8, "channels": 3, "test_fraction": 0.3}
    return Dataset(**{**values, "subset": None, "on_broken": "stop", **changes})


def digits(**changes: Any) -> Dataset:
    return dataset(**{"name": "digits", "channels": 1, "test_fraction": 0.2, **changes})


def run(chosen: Dataset) -> dict[str, Any]:
    return prepare(chosen, Path("prepared"), downloads=Path("downloads").resolve())


def load(split: str, kind: str = "images") -> np.ndarray:
    return np.load(Path("prepared", split, f"{kind}.npy"), mmap_mode="r")


def content(folder: str = "prepared") -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def put(name: str, color: int) -> None:
    """A plain grey image below raw/; its colour is its identity."""
    path = Path("raw", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (color, color, color)).save(path, "PNG")


def colors(split: str) -> list[int]:
    return [int(image[0, 0, 0]) for image in load(split)]


def tree() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


# Digits


def test_digits_keep_their_pixels_and_order() -> None:
    from sklearn.datasets import load_digits

    summary = run(digits())
    assert summary["counts"] == {"train": 1438, "test": 359} and summary["classes"] == list("0123456789")
    data = load_digits()
    test = np.sort(np.random.default_rng(0).permutation(1797)[:359])
    train = np.setdiff1d(np.arange(1797), test)
    for split, indices in (("train", train), ("test", test)):
        assert load(split).dtype == np.uint8 and load(split, "labels").dtype == np.int64
        assert np.array_equal(load(split)[..., 0], np.round(data.images[indices] * 255 / 16))
        assert np.array_equal(load(split, "labels"), data.target[indices])
        assert np.bincount(load(split, "labels"), minlength=10).min() > 0.07 * len(indices)


def test_each_run_gives_the_same_bytes_as_numpy_writes_them() -> None:
    run(digits())
    first = content()
    run(digits())
    assert content() == first
    for split in ("train", "test"):
        for kind in ("images", "labels"):
            expected = io.BytesIO()
            np.save(expected, np.ascontiguousarray(load(split, kind)))
            assert first[f"{split}/{kind}.npy"] == expected.getvalue()


def test_the_summary_describes_the_data() -> None:
    summary = run(digits())
    text = Path("prepared/dataset.json").read_text()
    assert text == json.dumps(summary, indent=2) + "\n"
    parts = [load(split, kind).tobytes() for split in ("train", "test") for kind in ("images", "labels")]
    assert summary["sha256"] == hashlib.sha256(b"".join(parts)).hexdigest()
    assert list(summary) == ["name", "shape", "counts", "classes", "class_counts", "broken", "sha256"]
    assert summary["shape"] == [8, 8, 1] and summary["broken"] == 0
    assert summary["class_counts"] == np.bincount(load("train", "labels")).tolist()


def test_digits_are_resized_as_files_are() -> None:
    run(digits())
    native = np.array(load("test"))
    run(digits(image_size=13, channels=3))
    assert load("test").shape == (359, 13, 13, 3)
    expected = decode.to_pixels(Image.fromarray(native[5, :, :, 0]), 13, 3)
    assert np.array_equal(load("test")[5], expected)


@pytest.mark.parametrize(("fraction", "held_out"), [(1e-9, 10), (1 - 1e-9, 1787)])
def test_each_digit_is_on_both_sides(fraction: float, held_out: int) -> None:
    assert run(digits(test_fraction=fraction))["counts"]["test"] == held_out
    for split in ("train", "test"):
        assert set(load(split, "labels")) == set(range(10))


def test_a_subset_is_taken_of_each_split() -> None:
    run(digits())
    whole = {split: (np.array(load(split)), np.array(load(split, "labels"))) for split in ("train", "test")}
    for subset, counts in ((400, {"train": 400, "test": 359}), (0.1, {"train": 144, "test": 36})):
        assert run(digits(subset=subset))["counts"] == counts
        for split, (images, labels) in whole.items():
            chosen = subset_indices(labels, subset)
            assert np.array_equal(load(split), images[chosen])
            assert np.array_equal(load(split, "labels"), labels[chosen])


@pytest.mark.process
def test_digits_and_folders_need_no_torch() -> None:
    for i in range(4):
        put(f"{i}.png", i)
    script = (
        "import sys; from pathlib import Path; from ddpm.config.schema import Dataset\n"
        "from ddpm.data.prepare import prepare\n"
        "if __name__ == '__main__':\n"
        "    common = dict(path='raw', image_size=8, channels=1, test_fraction=0.5, subset=None, on_broken='stop')\n"
        "    for name in ('digits', 'folder'):\n"
        "        prepare(Dataset(name=name, **common), Path('prepared'), Path('downloads'))\n"
        "    assert 'torch' not in sys.modules\n"
    )
    Path("script.py").write_text(script)
    subprocess.run([sys.executable, "script.py"], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


# Folders


def test_the_split_depends_on_file_content_only() -> None:
    for i in range(40):
        put(f"{i}.png", i)
    run(dataset())
    held_out = set(colors("test"))
    assert 3 < len(held_out) < 25
    shutil.rmtree("raw")
    for i in range(40):
        put(f"class{i % 3}/{99 - i}.png", i)  # other names, other order, other folders
    run(dataset())
    assert set(colors("test")) == held_out
    for i in range(40, 60):
        put(f"class1/{i}.png", i)  # more images move none of the others
    run(dataset())
    assert {color for color in colors("test") if color < 40} == held_out


def test_copies_of_a_file_are_on_the_same_side() -> None:
    for i in range(10):
        put(f"a{i}.png", i)
        put(f"b{i}.png", i)
    run(dataset(test_fraction=0.5))
    assert not set(colors("train")) & set(colors("test"))


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_of_a_folder_is_empty(fraction: float) -> None:
    for i in range(5):
        put(f"{i}.png", i)
    counts = run(dataset(test_fraction=fraction))["counts"]
    assert sorted(counts.values()) == [1, 4]


def test_class_sub_folders_become_labels_in_a_fixed_order() -> None:
    for i, name in enumerate(("dog/2.png", "cat/b/1.png", "cat/a.png", "dog/1.png", "bird/0.png")):
        put(f"train/{name}", i)
    put("test/dog/0.png", 100)
    put("test/bird/0.png", 101)
    summary = run(dataset())
    assert summary["classes"] == ["bird", "cat", "dog"] and summary["class_counts"] == [1, 2, 2]
    assert colors("train") == [4, 2, 1, 3, 0] and load("train", "labels").tolist() == [0, 1, 1, 2, 2]
    assert colors("test") == [101, 100] and load("test", "labels").tolist() == [0, 2]


def test_images_without_classes_have_the_label_zero() -> None:
    for i in range(4):
        put(f"{i}.png", i)
    summary = run(dataset())
    assert (
        summary["classes"] == summary["class_counts"] == []
        and summary["counts"]["train"] + summary["counts"]["test"] == 4
    )
    assert not load("train", "labels").any() and load("train", "labels").dtype == np.int64


def test_the_result_is_the_same_on_any_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    Path("raw").mkdir()
    for i in range(60):
        height, width = rng.integers(1, 60, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"raw/{i}.{('png', 'jpg', 'webp')[i % 3]}")
    monkeypatch.setattr(preparation, "IMAGES_PER_CHUNK", 7)
    results = []
    for cores in (1, 3):
        monkeypatch.setattr(pool, "_cores", lambda cores=cores: cores)
        run(dataset())
        results.append(content())
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "dataset.path = raw: there is no such folder; make it"),
        (["notes.txt", ".hidden.png"], r"dataset.path = raw: holds no \.png, \.jpg, .* files; put images there"),
        (["one.png"], "needs two different images at least, one of them to hold out; has 1 file$"),
        (["cat/1.png", "2.png"], r"in class sub-folders \(cat/1.png\) and beside them \(2.png\)"),
        (["train/1.png", "test/cat/2.png"], r"sub-folders \(test/cat/2.png\) and beside them \(train/1.png\)"),
        (["train/1.png", "test/notes.txt"], "test/ holds no images"),
    ],
)
def test_an_unfit_folder_is_reported_in_one_line(files: list[str], message: str) -> None:
    for i, name in enumerate(files):
        put(name, i)
    with pytest.raises(UserError, match=message) as fault:
        run(dataset())
    assert "\n" not in str(fault.value) and "dataset.path" in str(fault.value)
    assert tree() == (["raw"] if files else [])


def test_a_file_in_the_place_of_the_folder_is_reported() -> None:
    Path("raw").touch()
    with pytest.raises(UserError, match="raw: is not a folder"):
        run(dataset())


def test_a_folder_of_copies_of_one_file_is_refused() -> None:
    put("a.png", 0)
    put("b.png", 0)
    with pytest.raises(UserError, match="has 2 files of one content"):
        run(dataset())


def put_with_broken(count: int) -> None:
    for i in range(6):
        put(f"train/a/{i}.png", i)
        put(f"test/a/{i}.png", 10 + i)
    for i in range(count):
        Path(f"raw/train/a/broken{i:02}.png").write_bytes(b"no image")


def test_broken_images_stop_the_run_and_are_named() -> None:
    put_with_broken(25)
    Path("raw/test/a/0.png").write_bytes(Path("raw/test/a/0.png").read_bytes()[:50])
    with pytest.raises(UserError) as fault:
        run(dataset())
    lines = str(fault.value).splitlines()
    assert lines[:20] == [f"train/a/broken{i:02}.png: not a png, jpg, webp, bmp or gif image" for i in range(20)]
    assert lines[20] == "and 6 more"
    assert lines[21] == (
        "26 of 37 images in raw are broken: repair or remove them, or skip them: dataset.on_broken=skip"
    )
    assert len(lines) == 22 and tree() == ["raw"]


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2Jclears", "\x9b2J", "\u2028"])
def test_a_name_cannot_end_its_line_or_control_the_terminal(capsys: pytest.CaptureFixture[str], name: str) -> None:
    put_with_broken(0)
    Path(f"raw/train/a/{name}.png").write_bytes(b"")
    with pytest.raises(UserError) as fault:
        run(dataset())
    run(dataset(on_broken="skip"))
    for lines in (str(fault.value).split("\n"), capsys.readouterr().out.split("\n")[:-1]):
        assert all(line.isprintable() for line in lines)
        assert [line for line in lines if line.endswith(".png: the file is empty") and len(line) > 35]
    put(f"train/{name}.png", 99)
    with pytest.raises(UserError) as fault:
        run(dataset(on_broken="skip"))
    assert str(fault.value).isprintable()


def test_skipped_images_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    put_with_broken(3)
    Path("raw/test/a/2.png").write_bytes(b"")
    summary = run(dataset(on_broken="skip"))
    assert summary["broken"] == 4 and summary["counts"] == {"train": 6, "test": 5}
    assert colors("test") == [10, 11, 13, 14, 15] and len(load("test", "labels")) == 5
    printed = capsys.readouterr().out
    assert "test/a/2.png: the file is empty" in printed and "4 of 15 images in raw are broken and left out" in printed


def test_a_split_of_nothing_but_broken_images_stops_the_run() -> None:
    put_with_broken(0)
    for i in range(6):
        Path(f"raw/test/a/{i}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="6 of 12 images in raw are broken, and none is left to test on"):
        run(dataset(on_broken="skip"))


def test_images_outside_the_subset_are_not_decoded() -> None:
    put_with_broken(0)
    outside = sorted(set(range(6)) - set(subset_indices(np.zeros(6, np.int64), 2)))
    for i in outside:
        Path(f"raw/train/a/{i}.png").write_bytes(b"no image")
    assert run(dataset(subset=2))["counts"] == {"train": 2, "test": 2}


def test_a_class_that_loses_all_training_images_is_refused() -> None:
    put_with_broken(0)
    put("test/b/0.png", 90)
    Path("raw/train/b").mkdir()
    Path("raw/train/b/0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="no training image is left of b: repair or replace the broken ones") as fault:
        run(dataset(on_broken="skip"))
    assert "\n" not in str(fault.value) and tree() == ["raw"]


def test_a_class_that_loses_all_held_out_images_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    put_with_broken(0)
    put("train/b/0.png", 90)
    Path("raw/test/b").mkdir()
    Path("raw/test/b/0.png").write_bytes(b"no image")
    assert run(dataset(on_broken="skip"))["class_counts"] == [6, 1]
    assert "1 of 2 classes have training images only, none held out: b\n" in capsys.readouterr().out


def test_a_subset_has_every_class_or_is_refused() -> None:
    for i in range(40):
        put(f"train/common/{i}.png", i)
    for name in "abcd":
        put(f"train/{name}/0.png", 100)
    put("test/common/0.png", 200)
    assert run(dataset(subset=5))["class_counts"] == [1, 1, 1, 1, 1]
    for subset, left in ((4, 4), (0.1, 4), (1, 1)):
        with pytest.raises(UserError, match=f"dataset.subset = {subset}: leaves {left} .* of 44 for 5 classes; take 5"):
            run(dataset(subset=subset))
    with pytest.raises(UserError, match=r"dataset.subset = 9: leaves 9 .* 10 classes"):
        run(digits(subset=9))


def test_the_same_image_on_both_sides_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(6):
        put(f"train/a/{i}.png", i)
        put(f"test/a/{i}.png", 4 + i)
    Image.open("raw/train/a/3.png").save("raw/test/a/other.bmp")  # the same pixels in another format
    run(dataset())
    assert (
        "3 of 7 held-out images have the same pixels as a training image, for example test/a/0.png and train/a/4.png\n"
    ) in capsys.readouterr().out
    for i in range(6):
        put(f"test/a/{i}.png", 100 + i)
    Path("raw/test/a/other.bmp").unlink()
    run(dataset())
    assert "same pixels" not in capsys.readouterr().out


# Failure overwrites nothing


def test_a_full_disk_leaves_the_old_data(monkeypatch: pytest.MonkeyPatch) -> None:
    run(digits(subset=15))
    before = content()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(preparation, "_write_images", full)
    with pytest.raises(OSError, match="No space left on device") as fault:
        run(digits(subset=16))
    assert fault.value.errno == errno.ENOSPC and fault.value.filename == "prepared.tmp"
    assert content() == before and tree() == ["prepared"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_the_writer_reports_a_full_disk() -> None:
    rows: list[Any] = [np.zeros((100, 100, 3), np.uint8)]
    with pytest.raises(OSError) as fault:
        preparation._write_images(Path("/dev/full"), [rows], (100, 100, 3), hashlib.sha256())
    assert fault.value.errno == errno.ENOSPC


def test_a_run_stopped_in_the_middle_leaves_the_old_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm.runtime.signals import Interrupted

    run(digits(subset=15))
    before = content()
    rename = Path.rename

    def stop(path: Path, target: Path) -> Path:
        if path.name == "new":  # the worst moment: the old data has just been moved away
            raise Interrupted(15)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(Interrupted):
        run(digits(subset=16))
    assert content() == before and tree() == ["prepared"]


def test_what_a_killed_run_left_is_removed() -> None:
    Path("prepared.tmp/new").mkdir(parents=True)
    Path("prepared.tmp/new/half.npy").write_bytes(b"half")
    run(digits(subset=15))
    assert tree() == ["prepared"]
    assert sorted(content()) == [
        "dataset.json",
        *(f"{s}/{k}.npy" for s in ("test", "train") for k in ("images", "labels")),
    ]


def test_a_target_that_cannot_be_written_is_reported_by_path() -> None:
    Path("file").touch()
    with pytest.raises(OSError) as fault:
        prepare(digits(), Path("file/prepared"), Path("downloads"))
    assert "file/prepared.tmp" in str(fault.value)
