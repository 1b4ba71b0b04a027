import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel

from ddpm.diffusion import DiffusionConfig
from ddpm.errors import UserError
from ddpm.pipeline_io import load_model, save_model
from tests.conftest import small_unet

CONFIG = DiffusionConfig(100, "cosine", "v")


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", small_unet(), CONFIG, {"data": {"name": "digits"}})
    return tmp_path / "model"


def test_a_model_comes_back_as_it_was_saved(folder):
    unet, diffusion = load_model(folder)
    assert diffusion == CONFIG
    assert not unet.training
    expected = small_unet()
    assert unet.config == expected.config
    for name, value in expected.state_dict().items():
        assert torch.equal(unet.state_dict()[name], value)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_every_schedule_and_prediction_comes_back(tmp_path, schedule, prediction):
    config = DiffusionConfig(50, schedule, prediction, 1e-3, 0.3)
    save_model(tmp_path, small_unet(), config, {})
    assert load_model(tmp_path)[1] == config


def test_diffusers_loads_the_folder_and_predicts_the_same(folder):
    pipeline = DDPMPipeline.from_pretrained(folder)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 99])
    torch.testing.assert_close(pipeline.unet(x, t).sample, small_unet()(x, t), rtol=1e-5, atol=1e-5)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=1, num_inference_steps=5, output_type="np").images
    assert images.shape == (1, 8, 8, 1)
    assert np.isfinite(images).all()


def test_a_folder_of_diffusers_loads_here(folder, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "theirs")
    unet, diffusion = load_model(tmp_path / "theirs")
    assert diffusion == CONFIG
    x, t = torch.ones(1, 1, 8, 8), torch.tensor([5])
    torch.testing.assert_close(unet(x, t), small_unet()(x, t), rtol=0, atol=0)


def test_the_same_model_gives_the_same_bytes(folder, tmp_path):
    save_model(tmp_path / "again", small_unet(), CONFIG, {"data": {"name": "digits"}})
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes()


def damage(folder, kind):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    config = folder / "unet/config.json"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "other shape":
        values = json.loads(config.read_text()) | {"block_out_channels": [8, 32]}
        config.write_text(json.dumps(values))
    elif kind == "other blocks":
        values = json.loads(config.read_text()) | {"down_block_types": ["DownBlock2D", "KDownBlock2D"]}
        config.write_text(json.dumps(values))
    elif kind == "missing key":
        values = json.loads(config.read_text())
        del values["layers_per_block"]
        config.write_text(json.dumps(values))
    elif kind == "other embedding":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"flip_sin_to_cos": True}))
    elif kind == "no json":
        config.write_text("{")
    elif kind == "a list":
        config.write_text("[]")
    elif kind == "other schedule":
        path = folder / "scheduler/scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_schedule": "sigmoid"}))
    elif kind == "no weights":
        weights.unlink()
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "other shape",
        "other blocks",
        "missing key",
        "other embedding",
        "no json",
        "a list",
        "other schedule",
        "no weights",
        "no folder",
    ],
)
def test_a_damaged_model_folder_is_told_in_one_line_that_names_the_file(folder, kind):
    damage(folder, kind)
    with pytest.raises(UserError) as fault:
        load_model(folder)
    assert "\n" not in str(fault.value)
    assert str(folder) in str(fault.value)
    assert ".json" in str(fault.value) or ".safetensors" in str(fault.value)


def test_the_model_card_says_what_the_model_was_made_from(folder):
    card = (folder / "README.md").read_text()
    assert "name: digits" in card
    assert "library_name: diffusers" in card


def test_weights_are_safetensors_that_diffusers_reads(folder):
    UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)
