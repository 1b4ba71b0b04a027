"""A layout is recognised where there is no doubt, or refused in a line that says what was seen."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm.data.folders import Sides, read_folder, role_of
from ddpm.errors import UserError

HERE = "dataset.path = raw: "


@pytest.fixture(autouse=True)
def _in_a_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(layout: str, below: str = "raw") -> None:
    """Images, each of its own colour, in the folders named: `train/cat:3` has three, `train` one."""
    for k, place in enumerate(layout.split()):
        folder, _, count = place.partition(":")
        Path(below, folder).mkdir(parents=True, exist_ok=True)
        for i in range(int(count or 1)):
            Image.fromarray(np.full((8, 8, 3), (k, i, 7), np.uint8)).save(Path(below, folder, f"{i}.png"))


def read(layout: str) -> Sides:
    make(layout)
    return read_folder(Path("raw"), 0.3)


def of(files: dict[str, str | None]) -> set[str]:
    """The folders that these files lie in."""
    return {file.rpartition("/")[0] for file in files}


def refused(layout: str) -> str:
    with pytest.raises(UserError) as fault:
        read(layout)
    line = str(fault.value)
    assert line.startswith(HERE)
    assert line.isprintable()
    return line.removeprefix(HERE)


# layout, folders trained on, folders held out, classes
SPLITS = [
    ("train/cat train/dog test/cat test/dog", "train/cat train/dog", "test/cat test/dog", "cat dog"),
    ("train/cat train/dog val/cat", "train/cat train/dog", "val/cat", "cat dog"),
    ("Train/cat Test/cat", "Train/cat", "Test/cat", "cat"),
    ("TRAIN/cat VALIDATION/cat", "TRAIN/cat", "VALIDATION/cat", "cat"),
    ("training/a training/b testing/a", "training/a training/b", "testing/a", "a b"),
    ("train/a valid/a", "train/a", "valid/a", "a"),
    ("train/a dev/a", "train/a", "dev/a", "a"),
    ("train/a holdout/a", "train/a", "holdout/a", "a"),
    ("train/a held_out/a", "train/a", "held_out/a", "a"),
    ("train/a eval/a", "train/a", "eval/a", "a"),
    ("train/a val/a test/a", "train/a", "test/a", "a"),
    ("train/a val/a valid/a test/a", "train/a", "test/a", "a"),
    ("train test", "train", "test", ""),
    ("train/images test/images", "train/images", "test/images", ""),
    ("train test/images", "train", "test/images", ""),
    ("images/train images/val", "images/train", "images/val", ""),
    ("archive/train/cat archive/test/cat", "archive/train/cat", "archive/test/cat", "cat"),
    ("a/b/c/train/x a/b/c/train/y a/b/c/test/x", "a/b/c/train/x a/b/c/train/y", "a/b/c/test/x", "x y"),
    ("train/train/x train/train/y test/test/x", "train/train/x train/train/y", "test/test/x", "x y"),
    ("training_set/x training_set/y test_set/x", "training_set/x training_set/y", "test_set/x", "x y"),
    ("TrainImages/x TestImages/x", "TrainImages/x", "TestImages/x", "x"),
    ("train2017 val2017", "train2017", "val2017", ""),
    ("train test1", "train", "test1", ""),
    ("seg_train/seg_train/x seg_test/seg_test/x", "seg_train/seg_train/x", "seg_test/seg_test/x", "x"),
    ("cat/train cat/test", "cat/train", "cat/test", ""),
]


@pytest.mark.parametrize(("layout", "trained", "held_out", "classes"), SPLITS, ids=[split[0] for split in SPLITS])
def test_an_unmistakable_split_is_recognised(layout: str, trained: str, held_out: str, classes: str) -> None:
    sides = read(layout)
    assert (of(sides.train), of(sides.test)) == (set(trained.split()), set(held_out.split()))
    assert {name for name in sides.train.values() if name} == set(classes.split())
    assert set(sides.test.values()) <= set(sides.train.values())


# layout, classes
SPLIT_BY_CONTENT = [
    (":9", ""),
    ("bus:2 car:2 train:2", "bus car train"),
    ("bus:2 Train:2", "bus Train"),
    ("bus:2 bullet_train:2 test_pattern:2", "bus bullet_train test_pattern"),
    ("Cat:2 cat:2 DOG:2", "Cat cat DOG"),
    ("restrain:2 contest:2 medieval:2 latest:2 interval:2", "restrain contest medieval latest interval"),
    ("running:2 training:2", "running training"),
    ("cat:9", "cat"),
    ("cat/a:2 dog/b:2", "cat dog"),
    ("train:9", ""),
    ("train/cat:2 train/dog:2", "cat dog"),
    ("train/cat:9", "cat"),
    ("Training/images:9", ""),
    ("images:9", ""),
    ("archive/cat:2 archive/dog:2", "cat dog"),
    ("archive/data/train/cat:2 archive/data/train/dog:2", "cat dog"),
    ("archive/cat:9", "cat"),
    ("0:2 1:2 2:2", "0 1 2"),
    ("0:9", "0"),
]


@pytest.mark.parametrize(("layout", "classes"), SPLIT_BY_CONTENT, ids=[case[0] for case in SPLIT_BY_CONTENT])
def test_others_are_split_by_content_with_classes_on_both_sides(layout: str, classes: str) -> None:
    sides = read(layout)
    assert not set(sides.train) & set(sides.test)
    assert len(sides.train) + len(sides.test) == len(list(Path("raw").rglob("*.png")))
    expected: set[str | None] = set(classes.split()) or {None}
    assert set(sides.train.values()) == set(sides.test.values()) == expected


DOUBTFUL = [
    ("train/a Train/b", "holds Train/ (1 image), train/ (1 image), and Train/, train/ may be a training side"),
    ("train/a training/a test/a", "holds test/ (1 image), train/ (1 image), training/ (1 image), so what to train"),
    ("train/a val/a valid/a", "holds train/ (1 image), val/ (1 image), valid/ (1 image), so what to train on is in"),
    ("train/a test/a extra/a", "holds extra/ (1 image), test/ (1 image), train/ (1 image), so what to train on"),
    ("bus car train test", "holds bus/ (1 image), car/ (1 image), test/ (1 image), train/ (1 image), so what to"),
    (
        "cat:2 cat_test:2 dog:2",
        "holds cat/ (2 images), cat_test/ (2 images), dog/ (2 images), so what to train on",
    ),
    ("cat_train cat_test dog_train dog_test", "so what to train on is in doubt"),
    ("trainA trainB testA testB", "so what to train on is in doubt"),
    ("seg_train/a seg_test/a seg_pred", "so what to train on is in doubt"),
    ("a/seg_train a/seg_test b", "holds a/seg_test/ (1 image), which is named like a held-out side"),
    (
        "fold1/train fold1/test fold2/train fold2/test",
        "holds fold1/test/ (1 image), which is named like a held-out",
    ),
    ("seg_train/a my_test/a", "so what to train on is in doubt; leave one training and one held-out folder"),
    ("train:2 test/cat", "holds images in class sub-folders (test/cat/0.png) and beside them (train/0.png)"),
    ("train/cat test", "holds images in class sub-folders (train/cat/0.png) and beside them (test/0.png)"),
    ("train/a test/a test/b:2", "test/ has 1 class that train/ has no image of: b; put training images there"),
    ("train/a train/c test/unknown", "test/ has 1 class that train/ has no image of: unknown"),
    ("train/Cat test/cat", "test/ has 1 class that train/ has no image of: cat"),
    ("test/a:2 test/b", "holds test/ (3 images), which is named like a held-out side, but is not part of a split"),
    ("test/train/a:2 test/test/a", "holds test/ (2 images), which is named like a held-out side"),
    ("val test", "holds test/ (1 image), which is named like a held-out side, but is not part of a split"),
    ("archive/test/a archive/test/b", "holds archive/test/ (2 images), which is named like a held-out side"),
    ("bus car test:2", "holds test/ (2 images), which is named like a held-out side, but is not part of a split"),
    ("cat/train cat/test dog/train dog/test", "holds cat/test/ (1 image), which is named like a held-out side"),
    ("train/cat train/val/cat test/cat", "holds train/val/ (1 image), which is named like a held-out side"),
    ("train/cat/test train/dog/x test/cat", "holds train/cat/test/ (1 image), which is named like a held-out side"),
    ("train/cat extra", "holds extra/ (1 image), train/ (1 image), and train/ may be a training side"),
    ("train/cat train/dog pred/cat", "holds pred/ (1 image), train/ (2 images), and train/ may be a training side"),
    ("cat :2", "holds images in class sub-folders (cat/0.png) and beside them (0.png); move all into"),
    ("cat", "needs two different images at least, one of them to hold out; has 1 file"),
    ("cat dog", "needs two different images of one class at least, one of them to hold out; has 2 in 2 classes"),
]


@pytest.mark.parametrize(("layout", "line"), DOUBTFUL, ids=[case[0] for case in DOUBTFUL])
def test_a_doubtful_layout_is_refused_with_what_was_seen(layout: str, line: str) -> None:
    assert line in refused(layout)


@pytest.mark.parametrize("empty", ["train", "test", "Val"])
def test_a_side_without_images_is_refused(empty: str) -> None:
    Path("raw", empty).mkdir(parents=True)
    Path("raw", empty, "notes.txt").touch()
    other = "test/a:3" if empty == "train" else "train/a:3"
    assert refused(other).startswith(f"{empty}/ holds no images; put some there, or remove it")


def test_one_line_says_what_was_taken_and_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    read("train/cat:4 train/dog:3 val/cat:2 test/cat:1 :5")
    assert capsys.readouterr().out == (
        "raw: train/ is trained on (7 images), test/ is held out (1 image), left out: val/ (2 images), 5 images "
        "beside them left out (0.png); 2 classes (training + held out images): cat: 4 + 1, dog: 3 + 0\n"
    )


def test_the_line_of_a_split_by_content_has_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    Path("raw").mkdir()
    Path("raw/readme.txt").touch()
    sides = read(" ".join(f"archive/c{i:02}:3" for i in range(12)))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "raw: 1 other file ignored"
    assert second.startswith(
        f"raw: of 36 images of archive/, {len(sides.train)} trained on, {len(sides.test)} held out by content; "
        f"12 classes (training + held out images): c00: "
    )
    assert second.endswith(" and 2 more")


def test_copies_of_an_image_in_two_classes_stay_together() -> None:
    for name in "abc":
        make("x:4", f"raw/{name}")  # the same four images in each class
    sides = read_folder(Path("raw"), 0.3)
    content = [{Path("raw", file).read_bytes() for file in side} for side in (sides.train, sides.test)]
    assert all(content)
    assert not content[0] & content[1]


@pytest.mark.parametrize(
    ("name", "role", "rest"),
    [
        *((name, "train", "") for name in ("train", "TRAIN", "Training", "train_set", "train-images", "train2017")),
        *((name, "test", "") for name in ("test", "Testing", "testset", "TestSet", "held-out", "hold_out", "test 1")),
        *((name, "val", "") for name in ("val", "valid", "Validation", "eval", "evaluation", "dev", "val.data")),
        *((name, "", name) for name in ("cat", "attest", "trains", "12", "€")),
        ("seg_train", "train", "seg"),
        ("train_test_split", "", "train_test_split"),
        ("images", "", ""),
    ],
)
def test_the_role_of_a_folder_is_in_the_words_of_its_name(name: str, role: str, rest: str) -> None:
    assert role_of(name) == (role, rest)


# What keeps a folder from being read


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"caf\xe9/1.png", b"caf\xe9.txt", b".caf\xe9"])
def test_a_name_that_is_not_utf8_is_refused_with_its_remedy(name: bytes) -> None:
    make("cat:3", "my raw")
    path = Path("my raw", os.fsdecode(name))
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(UserError) as fault:
        read_folder(Path("my raw"), 0.3)
    line = str(fault.value)
    assert line.isprintable()
    assert line.startswith(r"dataset.path = my raw: the name of my raw/")
    assert r"caf\udce9" in line
    assert line.endswith(" is not UTF-8; rename it, or fix all names: convmv -f latin1 -t utf8 -r --notest 'my raw'")


@pytest.mark.parametrize("name", ["Raw", "raw ", "RAW"])
def test_a_folder_of_nearly_the_same_name_is_hinted_at(name: str) -> None:
    make("cat:3", name)
    with pytest.raises(UserError, match=f"there is no such folder, but there is '{name}'; set dataset.path to it$"):
        read_folder(Path("raw"), 0.3)


@pytest.mark.parametrize("there", [True, False])
def test_in_a_temporary_workspace_the_line_says_to_track_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    if there:
        Path("my raw").mkdir()
    with pytest.raises(UserError) as fault:
        read_folder(Path("my raw"), 0.3)
    assert str(fault.value).endswith(
        "; DVC runs this in a temporary workspace, which only files that git or DVC tracks reach: "
        f"run dvc add 'my raw' in {tmp_path}/main, or set dataset.path to its absolute path"
    )
    for root, path in ((str(tmp_path), "my raw"), (str(tmp_path / "main"), str(tmp_path / "my raw"))):
        monkeypatch.setenv("DVC_ROOT", root)
        with pytest.raises(UserError) as fault:
            read_folder(Path(path), 0.3)
        assert "temporary workspace" not in str(fault.value)
