"""A list of transforms gives uint8 images or float32 in [0, 1], or is refused in a line that says what to change."""

import numpy as np
import pytest
import torch

from ddpm.data.transforms import Transforms
from ddpm.errors import UserError

SHAPE = (3, 32, 32)


def node(name, **arguments):
    return {"_target_": f"torchvision.transforms.v2.{name}", **arguments}


SCALED = node("ToDtype", dtype="torch.float32", scale=True)
UNSCALED = node("ToDtype", dtype="torch.float32")
BYTES = node("ToDtype", dtype="torch.uint8", scale=True)
HALF = node("Normalize", mean=[0.5], std=[0.5])
IMAGENET = node("Normalize", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
RANGE = "and must stay in [0, 1]"
LEAVE_OUT = "leave Normalize out: the training itself maps images to [-1, 1]"


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [node("ToImage"), SCALED],
        [node("ConvertImageDtype")],
        [SCALED, BYTES],
        [node("ToPILImage"), node("PILToTensor")],
        [node("RandomCrop", size=32, padding=4), node("RandomHorizontalFlip"), SCALED],
        [SCALED, node("ColorJitter", brightness=0.5, contrast=0.5, saturation=0.5, hue=0.2)],
        [SCALED, node("RandomRotation", degrees=20)],
        [node("Compose", transforms=[SCALED, node("RandAugment")])],
        [node("RandomResizedCrop", size=32, interpolation=3), SCALED],
        [SCALED, node("GaussianNoise")],
        [node("GaussianBlur", kernel_size=23, sigma=9.0)],
        [node("RandomErasing", p=1.0), node("JPEG", quality=50)],
        [node("RandomGrayscale"), node("RandomInvert"), node("RandomPosterize", bits=2), node("AutoAugment")],
    ],
)
def test_lists_that_augment_images_are_accepted(nodes):
    Transforms(nodes).probe(SHAPE)


@pytest.mark.parametrize(
    ("nodes", "line"),
    [
        ([SCALED, HALF], f".1 (Normalize): gives floats from -1 to 1, {RANGE}; {LEAVE_OUT}"),
        ([SCALED, IMAGENET], f".1 (Normalize): gives floats from -2.118 to 2.64, {RANGE}; {LEAVE_OUT}"),
        ([SCALED, IMAGENET, BYTES], f".1 (Normalize): gives floats from -2.118 to 2.64, {RANGE}; {LEAVE_OUT}"),
        ([HALF], f"Got torch.uint8 (given uint8 of shape (3, 32, 32)); {LEAVE_OUT}"),
        ([UNSCALED], f".0 (ToDtype): gives floats from 0 to 255, {RANGE}; give scale: true to ToDtype"),
        ([UNSCALED, node("ColorJitter", brightness=0.1)], ".0 (ToDtype): gives floats from 0 to 255, "),
        ([node("Compose", transforms=[UNSCALED, node("ColorJitter", brightness=0.1)])], ".0 (Compose): gives floats"),
        ([UNSCALED, BYTES], f".0 (ToDtype): gives floats from 0 to 255, {RANGE}; give scale: true"),
        ([SCALED, node("ToDtype", dtype="torch.uint8")], ": gives uint8 from 0 to 1 for any image; that is hardly any"),
        ([SCALED, node("Normalize", mean=[0.0], std=[255.0])], ": gives float32 from 0 to 0.003922 for any image; "),
        ([SCALED, node("Normalize", mean=[float("nan")], std=[1.0])], "must be a finite number"),
        ([node("ToDtype", dtype="torch.float64", scale=True)], ": gives images of float64; the list must end in"),
        ([node("ToDtype", dtype="torch.float16", scale=True)], ": gives images of float16; "),
        ([node("ToDtype", dtype="torch.int64")], ": gives images of int64; "),
        ([node("ToDtype", dtype="float32")], "got <class 'str'> instead; write a dtype as torch.float32"),
        ([SCALED, node("RandomResizedCrop", size=32, interpolation=3)], f"{RANGE}; put what resizes, pads, rotates or"),
        ([SCALED, node("Pad", padding=2, fill=128), node("CenterCrop", size=32)], f"from 0 to 128, {RANGE}; put what"),
        ([node("RandomCrop", size=64)], ".0 (RandomCrop): Required crop size (64, 64) is larger than input image"),
        ([node("ToImage"), node("RandomApply", transforms=[node("RandomCrop", size=64)])], ".1 (RandomApply): Req"),
        ([node("RandomCrop", size=[1, 2, 3])], "only two dimensions (h, w) for size; change its arguments"),
        ([node("RandomApply", transforms=[node("ColorJitter", hue=3)])], ".v2.ColorJitter: hue values"),
        ([node("ToPILImage")], ": gives a PIL Image; the list must end in "),
        ([node("RandomApply", transforms=[SCALED])], ": gives float32 or uint8 at random; "),
        ([node("CenterCrop", size=16)], "the network takes (3, 32, 32); end the list with a Resize"),
        ([node("Grayscale")], ": gives images of shape (1, 32, 32); the network takes (3, 32, 32); give Grayscale num"),
        ([node("MixUp", num_classes=2)], ".0 (MixUp): "),
    ],
)
def test_every_other_list_is_refused_with_its_remedy(nodes, line):
    with pytest.raises(UserError) as fault:
        Transforms(nodes).probe(SHAPE)
    assert line in str(fault.value)
    assert str(fault.value).startswith("params.yaml: train.transforms")
    assert str(fault.value).isprintable()
    assert len(str(fault.value)) < 600


def test_nan_is_out_of_range():
    with pytest.raises(UserError, match="gives floats from nan to nan, and must stay in"):
        Transforms([SCALED]).stack([torch.full(SHAPE, torch.nan)], SHAPE)


def test_rounding_beyond_the_range_is_accepted():
    image = torch.full(SHAPE, 1 + 1e-6)
    assert torch.equal(Transforms([SCALED]).stack([image], SHAPE)[0], image)


def test_a_probe_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Transforms([node("RandomHorizontalFlip")]).probe(SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 256, 256), (1, 1024, 1024)])
def test_images_of_every_size_can_be_probed(shape):
    Transforms([node("RandomHorizontalFlip"), SCALED]).probe(shape)


def test_a_compose_draws_what_its_parts_would():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8))
    parts = [node("RandomCrop", size=32, padding=4), node("RandomHorizontalFlip"), node("ColorJitter", brightness=0.5)]
    one, other = (Transforms(nodes)(image, 7) for nodes in (parts, [node("Compose", transforms=parts)]))
    assert torch.equal(one, other)
