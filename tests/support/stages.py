"""The stages on the smoke preset, in the current folder and in this process."""

from pathlib import Path
from types import ModuleType

from omegaconf import OmegaConf

from ddpm.config.load import load_params
from stages import evaluate, prepare_data, sample, train
from tests.conftest import composed

STAGES = (prepare_data, train, sample, evaluate)
# a hundred timesteps: the bound takes a network evaluation for each
SETTINGS = ("+experiment=smoke", "train.steps=24", "diffusion.timesteps=100", "runtime.threads=1")


def run(stage: ModuleType, *overrides: str) -> None:
    """Run a stage with these settings, which stay in params.yaml."""
    Path("params.yaml").write_text(OmegaConf.to_yaml(composed(*SETTINGS, *overrides)))
    stage.main(load_params(stage.SECTIONS))
