import hashlib
import json
import os
import re

import numpy as np
import pytest

from ddpm.data.prepared import Prepared
from ddpm.errors import UserError

IMAGES = np.arange(50, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(50) % 10


def written(folder, images=IMAGES, labels=LABELS, **changes):
    """A folder of prepared data; `images` and `labels` are those of training."""
    digest = hashlib.sha256(b"".join(array.tobytes() for array in (images, labels, IMAGES[:20], LABELS[:20])))
    info = {"name": "x", "shape": [8, 8, 3], "counts": {"train": 50, "test": 20}, "classes": list("abcdefghij")}
    info |= {"class_counts": [5] * 10, "broken": 0, "sha256": digest.hexdigest()} | changes
    for split in ("train", "test"):
        (folder / split).mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(info))
    np.save(folder / "train/images.npy", images)
    np.save(folder / "train/labels.npy", labels)
    np.save(folder / "test/images.npy", IMAGES[:20])
    np.save(folder / "test/labels.npy", LABELS[:20])
    return folder


def test_both_splits_are_mapped_and_not_read(tmp_path):
    data = Prepared(written(tmp_path))
    for split, count in ((data.train, 50), (data.test, 20)):
        assert isinstance(split.images, np.memmap) and isinstance(split.labels, np.memmap)
        assert np.array_equal(split.images, IMAGES[:count]) and np.array_equal(split.labels, LABELS[:count])
    assert data.info["counts"] == {"train": 50, "test": 20}
    data.verify()


def test_missing_or_odd_prepared_data_is_reported_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"dataset.json: No such file or directory; run the stage prepare_data again$"):
        Prepared(tmp_path)
    for kind in ("images", "labels"):
        for split in ("train", "test"):
            path = written(tmp_path) / split / f"{kind}.npy"
            path.unlink()
            fault = f"^{re.escape(str(path))}: .*No such file.*; run the stage prepare_data again$"
            with pytest.raises(UserError, match=fault):
                Prepared(tmp_path)
    with pytest.raises(UserError, match=r"holds float32 \(50, 8, 8, 3\), not uint8"):
        Prepared(written(tmp_path, IMAGES.astype(np.float32)))
    for content in (b"no array", b"", b"\x93NUMPY\x01\x00"):
        (tmp_path / "train/images.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"images.npy: .*run the stage prepare_data"):
            Prepared(tmp_path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"shape": [8, 8, 1]}, r"images.npy: holds \(50, 8, 8, 3\), not \(50, 8, 8, 1\)"),
        ({"counts": {"train": 49, "test": 20}}, r"images.npy: holds \(50, 8, 8, 3\), not \(49, 8, 8, 3\)"),
        ({"counts": {"train": 50, "test": 1}}, r"test/images.npy: holds \(20, 8, 8, 3\), not \(1, 8, 8, 3\)"),
        ({"counts": {}}, r"images.npy: holds \(50, 8, 8, 3\), not \(None, 8, 8, 3\)"),
        ({"classes": ["a"], "class_counts": [50]}, "labels.npy: holds not 50 labels of 1 classes"),
        ({"labels": LABELS[:-1]}, "labels.npy: holds not 50 labels of 10 classes"),
        ({"labels": LABELS - 1}, "labels.npy: holds not 50 labels of 10 classes"),
        ({"shape": [8, 8]}, "dataset.json: shape: List should have at least 3 items"),
        ({"shape": [8, 8, "3"]}, "dataset.json: shape: 2: Input should be a valid integer"),
        ({"class_counts": [5] * 9}, "dataset.json: class_counts has 9 numbers for 10 classes"),
        ({"class_counts": [0] * 10}, "dataset.json: class_counts: 0: Input should be greater than or equal to 1"),
        ({"class_counts": None}, "dataset.json: class_counts: Input should be a valid array"),
        ({"sha256": None}, "dataset.json: sha256: Input should be a valid string"),
    ],
)
def test_prepared_data_that_does_not_match_is_reported_in_one_line(tmp_path, changes, fault):
    with pytest.raises(UserError, match=f"{fault}.*; run the stage prepare_data again$"):
        Prepared(written(tmp_path, **changes))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", ["images", "labels"])
def test_one_other_value_anywhere_does_not_match_dataset_json(tmp_path, split, kind):
    array = np.lib.format.open_memmap(written(tmp_path) / split / f"{kind}.npy", "r+")
    array.flat[7] = array.flat[7] + 1
    array.flush()
    with pytest.raises(UserError, match=r"does not match its dataset.json; run the stage prepare_data again$"):
        Prepared(tmp_path).verify()


def replaced(path):
    """Replace a file by another of the same content, as a stage that is run again does."""
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda folder: None, False),
        (lambda folder: replaced(folder / "train/images.npy"), False),
        (lambda folder: os.utime(folder / "test/labels.npy", (0, 0)), False),
        (lambda folder: written(folder, images=IMAGES[::-1]), True),
        (lambda folder: written(folder, labels=LABELS[::-1]), True),
        (lambda folder: (folder / "test/labels.npy").unlink(), True),
        (lambda folder: (folder / "dataset.json").write_text("{}"), True),
    ],
)
def test_a_change_is_one_of_the_content_however_the_files_were_touched(tmp_path, change, changed):
    data = Prepared(written(tmp_path))
    data.verify()
    assert not data.changed()
    change(tmp_path)
    assert data.changed() is changed
