"""What all tests share: an environment without network or tracking, small networks, the composed default parameters."""

import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch or NumPy is imported anywhere: use the kernels that every x86-64 machine has
from ddpm.runtime.stage import REPRODUCIBLE_ENVIRONMENT

os.environ.update(REPRODUCIBLE_ENVIRONMENT)
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from ddpm.core.unet import UNet, UNetConfig, initialise

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the suite runs in two processes


@functools.cache
def composed_by_hydra(*overrides: str) -> DictConfig:
    """The parameters as Hydra composes them; it takes 0.1 s."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("config", overrides=list(overrides))


def composed(*overrides: str) -> dict[str, Any]:
    """The parameters that `dvc exp run -S ...` would write, as plain values.

    Groups and presets are composed once per process; single settings are set on a copy, as Hydra does it.
    """
    settings = [text for text in overrides if "." in text.partition("=")[0] and text[0] not in "+~"]
    params = copy.deepcopy(composed_by_hydra(*(text for text in overrides if text not in settings)))
    for setting in OverridesParser.create().parse_overrides(settings):
        OmegaConf.update(params, setting.key_or_group, setting.value())
    tree = OmegaConf.to_container(params, resolve=True)
    assert isinstance(tree, dict)
    return tree  # type: ignore[return-value]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that drive dvc in a clone, by their folder."""
    for item in items:
        if item.path.is_relative_to(ROOT / "tests/pipeline"):
            item.add_marker("pipeline")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A stage sets its number of threads: two workers of two threads each on two cores are many times slower."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def tree() -> dict[str, Any]:
    """The default parameters, to be changed freely."""
    return composed()


def small_unet(size: int = 8, channels: int = 1, **changes: Any) -> UNet:
    """A network of a few thousand parameters, with weights that are not zero anywhere."""
    values = {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention": (False, True),
        "norm_num_groups": 8,
    }
    unet = UNet(UNetConfig(**(values | changes)))
    generator = torch.Generator().manual_seed(0)
    initialise(unet, generator)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return unet.eval()
