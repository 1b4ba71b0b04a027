import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddpm.data.prepared import Prepared
from ddpm.errors import UserError
from tests.conftest import ROOT

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
        ({"classes": ["a"], "class_counts": [50]}, "labels.npy: does not hold 50 labels of 1 class"),
        ({"labels": LABELS[:-1]}, "labels.npy: does not hold 50 labels of 10 classes"),
        ({"labels": LABELS - 1}, "labels.npy: does not hold 50 labels of 10 classes"),
        ({"shape": [8, 8]}, "dataset.json: shape: List should have at least 3 items"),
        ({"shape": [8, 8, "3"]}, "dataset.json: shape: 2: Input should be a valid integer"),
        ({"class_counts": [5] * 9}, "dataset.json: class_counts has 9 numbers for 10 classes"),
        ({"class_counts": [0] * 10}, "dataset.json: class_counts: 0: Input should be greater than or equal to 1"),
        ({"class_counts": None}, "dataset.json: class_counts: Input should be a valid array"),
        ({"sha256": None}, "dataset.json: sha256: Input should be a valid string"),
    ],
)
def test_data_that_does_not_match_is_reported_in_one_line(tmp_path, changes, fault):
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
def test_only_another_content_is_a_change(tmp_path, change, changed):
    data = Prepared(written(tmp_path))
    data.verify()
    assert not data.changed()
    change(tmp_path)
    assert data.changed() is changed


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A set whose files were written a minute ago, with 2 MB of pixels, and a checkout beside it."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "checkout"))
    (folder := tmp_path / "prepared").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (50, 120, 120, 3), dtype=np.uint8)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in (images, LABELS, images[:20], LABELS[:20])))
    written(folder, images, shape=[120, 120, 3], sha256=digest.hexdigest())
    np.save(folder / "test/images.npy", images[:20])
    age(folder)
    return folder


def age(folder):
    for path in folder.rglob("*.*"):
        os.utime(path, (written := path.stat().st_mtime - 60, written))


def bytes_read(action):
    """The bytes that this process reads from files during `action`, without mapped pages."""
    before = int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])
    action()
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1]) - before


def verify(folder):
    Prepared(folder).verify()


linux = pytest.mark.skipif(sys.platform != "linux", reason="the count of bytes is Linux's")
LITTLE = 100_000  # bytes: dataset.json, the headers, the record


@linux
def test_a_second_start_reads_no_pixels(settled):
    assert bytes_read(lambda: verify(settled)) > 2_000_000
    assert bytes_read(lambda: verify(settled)) < LITTLE
    assert bytes_read(lambda: Prepared(settled).changed()) < LITTLE


@linux
@pytest.mark.parametrize(
    "change",
    [
        lambda folder: os.utime(folder / "train/images.npy", (0, 0)),
        lambda folder: replaced(folder / "test/images.npy"),
        lambda folder: replaced(folder / "test/labels.npy"),
        lambda folder: replaced(folder / "dataset.json"),
    ],
)
def test_a_file_that_was_touched_or_replaced_is_read_again_once(settled, change):
    verify(settled)
    change(settled)
    age(settled)
    assert bytes_read(lambda: verify(settled)) > 2_000_000
    assert bytes_read(lambda: verify(settled)) < LITTLE


def edit(path):
    array = np.lib.format.open_memmap(path, "r+")
    array.flat[7] = array.flat[7] + 1
    array.flush()


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_an_edited_file_is_found_at_every_start_that_follows(settled, kind):
    verify(settled)
    data = Prepared(settled)
    edit(settled / f"train/{kind}.npy")
    for _ in range(2):  # what does not match is never recorded
        with pytest.raises(UserError, match=r"does not match its dataset.json; run the stage prepare_data again$"):
            verify(settled)
    assert data.changed()


def test_files_of_equal_size_inode_and_time_are_trusted(settled):
    """An edit that sets the old time again goes unseen, as it does in DVC, until .cache/ is deleted."""
    verify(settled)
    before = (path := settled / "train/images.npy").stat()
    edit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    verify(settled)
    (record,) = (settled.parent / "checkout/.cache/verified").iterdir()
    record.unlink()
    with pytest.raises(UserError, match="does not match"):
        verify(settled)


@linux
@pytest.mark.parametrize("damage", [b"", b"[]", b"\xff\x00", None])
def test_a_damaged_record_is_ignored_and_replaced(settled, damage):
    verify(settled)
    (record,) = (settled.parent / "checkout/.cache/verified").iterdir()
    record.write_bytes(record.read_bytes()[:-5] if damage is None else damage)
    assert bytes_read(lambda: verify(settled)) > 2_000_000
    assert bytes_read(lambda: verify(settled)) < LITTLE


def test_files_written_just_now_are_not_recorded(settled):
    """A second write within the resolution of the file system's clock would not show."""
    replaced(settled / "test/labels.npy")
    verify(settled)
    assert not (settled.parent / "checkout/.cache").exists()


def test_a_record_that_cannot_be_kept_is_only_reported(settled, capsys):
    (settled.parent / "checkout").mkdir()
    (settled.parent / "checkout/.cache").write_text("a file in its place")
    verify(settled)
    err = capsys.readouterr().err
    assert re.search(r"\.json: not kept, so the next start reads all data again: ", err) and err.count("\n") == 1


SEVERAL = """
import os, sys
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from ddpm.data.prepared import Prepared
from ddpm.errors import UserError
from ddpm.runtime import processes

processes.join()
rank = processes.rank()
def read():
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
def tried(action):
    before = read()
    try:
        result = action()
    except UserError as fault:
        result = str(fault)
    print(rank, result, (read() - before) // 1_000_000, flush=True)
one, own = Path(sys.argv[1]), Path(sys.argv[2 + rank])
for folder in (one, one, own):
    tried(lambda: Prepared(folder).verify())
data = Prepared(one)
processes.barrier()
if rank == 1:
    os.utime(one / "train/labels.npy", (1e9, 1e9))
processes.barrier()
tried(data.changed)
if rank == 1:
    with (one / "train/images.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(bytes(1))
processes.barrier()
tried(data.changed)
tried(lambda: Prepared(one).verify())
"""


@linux
@pytest.mark.process
def test_of_several_processes_one_reads_and_all_agree(settled, tmp_path):
    """One folder: one process reads it for all. A copy on each machine: each process reads its own."""
    copies = [tmp_path / name for name in ("a", "b")]
    for copy in copies:
        shutil.copytree(settled, copy)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SEVERAL, str(settled), *map(str, copies)],
            env=os.environ | meeting | {"RANK": str(rank), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    out = [process.communicate(timeout=120)[0].splitlines() for process in running]
    fault = f"{settled}: does not match its dataset.json; run the stage prepare_data again"
    outcomes = ["None", "None", "None", "False", "True", fault]
    for rank, read in enumerate(([3, 0, 3, 3, 3, 3], [0, 0, 3, 0, 0, 0])):
        assert out[rank] == [f"{rank} {what} {size}" for what, size in zip(outcomes, read, strict=True)]
