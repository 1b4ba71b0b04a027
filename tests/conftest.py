"""What all tests share: a quiet environment, small networks, the composed default parameters."""

import os
from pathlib import Path
from typing import Any

# Before torch or NumPy is imported anywhere: the kernels that every x86-64 machine has
from ddpm.runtime.stage import REPRODUCIBLE_ENVIRONMENT

os.environ.update(REPRODUCIBLE_ENVIRONMENT)
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ddpm.core.unet import UNet, UNetConfig, initialise

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the suite runs in two processes


def composed(*overrides: str) -> dict[str, Any]:
    """The parameters that `dvc exp run -S ...` would write, as plain values."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        tree = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)
    assert isinstance(tree, dict)
    return tree  # type: ignore[return-value]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What drives dvc in a clone is marked by its folder."""
    for item in items:
        if item.path.is_relative_to(ROOT / "tests/pipeline"):
            item.add_marker("pipeline")


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
