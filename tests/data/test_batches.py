import hashlib
import json
import os
import subprocess
import sys
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm.core.pixels import to_model_range
from ddpm.data.batches import as_tensor, batches
from ddpm.data.prepared import Images
from ddpm.errors import UserError
from tests.conftest import ROOT

IMAGES = np.arange(50, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(50) * 7
SPLIT = Images(IMAGES, LABELS)
JITTER = [{"_target_": "torchvision.transforms.v2.RandomCrop", "size": 8, "padding": 3}]


def drawn(first=0, last=12, **options):
    options = {"batch_size": 8, "seed": 0, "transforms": []} | options
    return [images for images, _ in batches(SPLIT, steps=range(first, last), **options)]


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("transforms", [[], [{"_target_": "torchvision.transforms.v2.RandomHorizontalFlip"}]])
def test_every_image_comes_with_its_own_label(transforms, workers):
    steps = batches(SPLIT, batch_size=8, seed=0, steps=range(12), transforms=transforms, workers=workers)
    for images, labels in steps:
        assert labels.dtype == torch.int64
        assert (images[:, 0, 0, 0].long() * 7).tolist() == labels.tolist()


def test_an_epoch_shows_each_image_once_in_an_order_of_its_own():
    epochs = [torch.cat(drawn(6 * e, 6 * e + 6))[:, 0, 0, 0].tolist() for e in range(2)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("transforms", [[], JITTER])
def test_a_resumed_run_sees_the_batches_that_are_still_to_come(transforms):
    whole = drawn(transforms=transforms)
    for first in (1, 6, 7):
        rest = drawn(first, transforms=transforms)
        assert all(torch.equal(a, b) for a, b in zip(whole[first:], rest, strict=True))


@pytest.mark.process
@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(workers):
    alone, helped = drawn(transforms=JITTER), drawn(transforms=JITTER, workers=workers)
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.process
def test_the_other_workers_end_when_one_was_killed():
    """Also while the error's traceback is kept: at its end Python would wait for a worker that waits for work."""
    steps = batches(SPLIT, batch_size=8, seed=0, steps=range(10**9), transforms=[], workers=2)
    next(steps)
    first, second = active_children()
    first.kill()
    with pytest.raises(RuntimeError, match="DataLoader worker") as kept:
        while True:
            next(steps)
    second.join(10)
    assert not second.is_alive(), kept


def test_random_transforms_draw_for_each_image_of_a_batch():
    image = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1).repeat(32, axis=0)
    split = Images(image, np.zeros(32, dtype=np.int64))
    batch, _ = next(batches(split, batch_size=32, seed=0, steps=range(1), transforms=JITTER))
    assert len({tuple(one.flatten().tolist()) for one in batch}) > 10


def test_transforms_leave_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn(transforms=JITTER)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_gives_another_order():
    assert not torch.equal(drawn(0, 1)[0], drawn(0, 1, seed=1)[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_transforms_that_end_in_floats_give_the_same_images(workers):
    node = {"_target_": "torchvision.transforms.v2.ToDtype", "dtype": "torch.float32", "scale": True}
    floats, pixels = drawn(transforms=[node], workers=workers), drawn()
    for one, other in zip(floats, pixels, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(to_model_range(one), to_model_range(other))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_transform_that_fails_at_a_later_step_is_one_line(workers):
    """In a worker, too, where torch would add its traceback."""
    crop = {"_target_": "torchvision.transforms.v2.RandomCrop", "size": 64}
    sometimes = {"_target_": "torchvision.transforms.v2.RandomApply", "p": 0.02, "transforms": [crop]}
    steps = batches(SPLIT, batch_size=8, seed=0, steps=range(99), transforms=[JITTER[0], sometimes], workers=workers)
    assert len(next(steps)[0]) == 8
    with pytest.raises(UserError) as fault:
        list(steps)
    assert str(fault.value).startswith("params.yaml: train.transforms.1 (RandomApply): Required crop size (64, 64) is ")
    assert str(fault.value).isprintable()


def test_floats_outside_the_range_never_reach_the_network():
    """Each batch is checked, since a probe may miss a rare transform."""
    fill = {"_target_": "torchvision.transforms.v2.RandomErasing", "p": 0.01, "value": 9.0}
    scaled = {"_target_": "torchvision.transforms.v2.ToDtype", "dtype": "torch.float32", "scale": True}
    with pytest.raises(UserError, match=r"train.transforms: gives floats from 0 to 9, and must stay in \[0, 1\]; "):
        drawn(0, 99, transforms=[scaled, fill])


def test_a_batch_larger_than_the_folder_takes_all_images_alike():
    """120 of 50 images: twice each, and 20 a third time; each step is an epoch of three new orders."""
    steps = [[int(value) for value in batch[:, 0, 0, 0]] for batch in drawn(0, 4, batch_size=120)]
    for batch in steps:
        assert sorted(batch[:50]) == sorted(batch[50:100]) == list(range(50))
        assert len(set(batch[100:])) == 20
        assert batch[:50] != batch[50:100]
    assert len(set(map(tuple, steps))) == 4


@pytest.mark.heavy
@pytest.mark.parametrize("workers", [0, 2])
def test_a_large_batch_is_the_same_after_a_stop_and_with_workers(workers):
    whole = drawn(0, 3, batch_size=120, transforms=JITTER)
    rest = drawn(1, 3, batch_size=120, transforms=JITTER, workers=workers)
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], rest, strict=True))


def test_an_image_that_is_twice_in_a_batch_is_augmented_twice():
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    split = Images(images, np.zeros(1, int))
    batch, _ = next(batches(split, batch_size=16, seed=0, steps=range(1), transforms=JITTER))
    assert len({tuple(one.flatten().tolist()) for one in batch}) > 10


def test_stored_pixels_arrive_in_the_models_layout():
    images = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    tensor = as_tensor(images)
    assert tensor.shape == (2, 3, 3, 4)
    assert tensor[1, 2, 0, 3] == images[1, 0, 3, 2]


LARGER = """
import resource, sys
from pathlib import Path
import numpy as np
from ddpm.data.batches import batches
from ddpm.data.prepared import Prepared

def held(what):  # MiB of this process
    return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) / 1024

folder = Path(sys.argv[1])
data = Prepared(folder)
data.verify()
images, labels = data.train
steps = range(2 * len(images) // 50)
stream = batches(data.train, batch_size=50, seed=0, steps=steps, transforms=[])
next(stream)
before = held("RssAnon:")  # without the pages of files
resource.setrlimit(resource.RLIMIT_DATA, (int(held("VmData:") + 192) << 20, -1))
try:
    np.array(images)
except MemoryError:
    print("the limit holds")
seen = np.zeros((len(steps) - 1, 50), np.int64)
for row, (batch, _) in zip(seen, stream):
    low, high = batch[:, 0, 0, 0].long(), batch[:, 1, 0, 0].long()
    row[:] = low + 200 * high
rest = seen.ravel()
assert not data.changed()
print(len(rest), len(np.unique(rest[-len(images):])), held("RssAnon:") - before < 160)
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
def test_data_larger_than_memory_is_read_and_shuffled_exactly(tmp_path):
    """Two epochs over 450 MB with 192 MiB to spare; the file is sparse, and each image carries its index."""
    count, size = 2_300, 256
    for split, rows in (("train", count), ("test", 1)):
        (tmp_path / split).mkdir()
        images = np.lib.format.open_memmap(tmp_path / split / "images.npy", "w+", "uint8", (rows, 1, size * size, 3))
        images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(rows) % 200, np.arange(rows) // 200
        np.save(tmp_path / split / "labels.npy", np.zeros(rows, np.int64))
    digest = hashlib.sha256()
    for split in ("train", "test"):
        for name in ("images", "labels"):
            digest.update(np.load(tmp_path / split / f"{name}.npy", mmap_mode="r").data)
    info = {"name": "large", "shape": [1, size * size, 3], "counts": {"train": count, "test": 1}, "classes": []}
    info |= {"class_counts": [], "broken": 0, "sha256": digest.hexdigest()}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    done = subprocess.run(
        [sys.executable, "-c", LARGER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.split("\n")[:2] == ["the limit holds", f"{2 * count - 50} {count} True"], done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the count of bytes is Linux's")
def test_a_batch_reads_little_more_than_its_own_images(tmp_path):
    """Without `announce`, each image is read with 128 KiB around it: ten times as much."""

    def from_disk() -> int:
        return int(Path("/proc/self/io").read_text().partition("\nread_bytes: ")[2].split()[0])

    count, size = 2000, 64
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", np.broadcast_to(image, (count, *image.shape)))
    with (tmp_path / "images.npy").open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    before = from_disk()
    one = next(batches(Images(images, np.zeros(count, np.int64)), batch_size=32, seed=0, steps=range(1), transforms=[]))
    if not (read := from_disk() - before):
        pytest.skip("these files are in memory")
    assert read < 3 * one[0].numel()
