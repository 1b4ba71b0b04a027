import numpy as np
import pytest
import torch

from ddpm.data import as_tensor, batches, load_images, load_info
from ddpm.errors import UserError

IMAGES = np.arange(50, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), dtype=np.uint8)
JITTER = [{"_target_": "torchvision.transforms.v2.RandomCrop", "size": 8, "padding": 3}]


def drawn(first=0, last=12, **options):
    options = {"batch_size": 8, "seed": 0, "transforms": []} | options
    return list(batches(IMAGES, steps=range(first, last), **options))


def test_an_epoch_shows_each_image_at_most_once_and_another_epoch_in_another_order():
    epochs = [torch.cat(drawn(6 * e, 6 * e + 6))[:, 0, 0, 0].tolist() for e in range(2)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("transforms", [[], JITTER])
def test_a_resumed_run_sees_the_batches_that_are_still_to_come(transforms):
    whole = drawn(transforms=transforms)
    for first in (1, 6, 7):
        rest = drawn(first, transforms=transforms)
        assert all(torch.equal(a, b) for a, b in zip(whole[first:], rest, strict=True))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(workers):
    alone, helped = drawn(transforms=JITTER), drawn(transforms=JITTER, workers=workers)
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_random_transforms_draw_anew_for_every_image_of_a_batch():
    image = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1).repeat(32, axis=0)
    batch = next(batches(image, batch_size=32, seed=0, steps=range(1), transforms=JITTER))
    assert len({tuple(one.flatten().tolist()) for one in batch}) > 10


def test_transforms_leave_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn(transforms=JITTER)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_gives_another_order():
    assert not torch.equal(drawn(0, 1)[0], drawn(0, 1, seed=1)[0])


def test_transforms_may_end_in_floats():
    node = {"_target_": "torchvision.transforms.v2.ToDtype", "dtype": "torch.float32", "scale": True}
    batch = drawn(
        0, 1, transforms=[node, {"_target_": "torchvision.transforms.v2.Normalize", "mean": [0.5], "std": [0.5]}]
    )
    assert batch[0].dtype == torch.float32
    torch.testing.assert_close(batch[0], drawn(0, 1)[0] / 127.5 - 1)


def test_a_transform_that_changes_the_shape_is_refused():
    with pytest.raises(UserError, match=r"train.transforms: give shape \(3, 4, 4\).*\(3, 8, 8\)"):
        drawn(transforms=[{"_target_": "torchvision.transforms.v2.CenterCrop", "size": 4}])


def test_stored_pixels_arrive_in_the_models_layout():
    images = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    tensor = as_tensor(images)
    assert tensor.shape == (2, 3, 3, 4)
    assert tensor[1, 2, 0, 3] == images[1, 0, 3, 2]


def test_a_split_is_mapped_not_read(tmp_path):
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train/images.npy", IMAGES)
    images = load_images(tmp_path, "train")
    assert isinstance(images, np.memmap)
    assert images.shape == (50, 8, 8, 3)


def test_missing_or_odd_prepared_data_is_told_in_one_line(tmp_path):
    for read in (lambda: load_images(tmp_path, "train"), lambda: load_info(tmp_path)):
        with pytest.raises(UserError, match=r"run the stage prepare_data again") as fault:
            read()
        assert "\n" not in str(fault.value)
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train/images.npy", IMAGES.astype(np.float32))
    with pytest.raises(UserError, match=r"holds float32 \(50, 8, 8, 3\), not uint8"):
        load_images(tmp_path, "train")
    for content in (b"no array", b"", b"\x93NUMPY\x01\x00"):
        (tmp_path / "train/images.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"images.npy: .*run the stage prepare_data"):
            load_images(tmp_path, "train")
