import errno
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file

from ddpm.core import samplers
from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.errors import UserError
from ddpm.model_folder import OLD_NAMES, load_model, load_weights, save_model, training_run, weights_sha256
from ddpm.runtime.signals import Interrupted
from ddpm.runtime.tracking import Tracker
from stages import prepare_data
from stages import train as train_stage
from tests.conftest import small_unet
from tests.support.stages import run as run_stage
from tests.support.training import same, train

CONFIG = DiffusionConfig(100, "cosine", "v")


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", small_unet(), CONFIG, {"data": {"name": "digits"}})
    return tmp_path / "model"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/.diffusion_pytorch_model.safetensors.tmp").symlink_to("/dev/full")  # it is renamed at the end
    with pytest.raises(OSError, match="No space left") as fault:
        save_model(tmp_path, small_unet(), CONFIG, {})
    assert fault.value.errno == errno.ENOSPC  # run_stage reports it in one line


def test_a_model_comes_back_as_it_was_saved(folder):
    unet, diffusion, _ = load_model(folder)
    assert diffusion == CONFIG
    assert not unet.training
    expected = small_unet()
    assert unet.config == expected.config
    for name, value in expected.state_dict().items():
        assert torch.equal(unet.state_dict()[name], value)


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
    unet, diffusion, _ = load_model(tmp_path / "theirs")
    assert diffusion == CONFIG
    x, t = torch.ones(1, 1, 8, 8), torch.tensor([5])
    torch.testing.assert_close(unet(x, t), small_unet()(x, t), rtol=0, atol=0)


# google/ddpm-cifar10-32, with a sixteenth of its channels
CIFAR10 = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": (8, 16, 16, 16),
    "center_input_sample": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 8,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}


def save_of_diffusers(folder, **values):
    """A folder that diffusers itself wrote, and its network."""
    torch.manual_seed(0)
    unet = UNet2DModel(**values).eval()
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)
    return unet


def predictions(ours, theirs):
    c = ours.config
    x = torch.randn(2, c.in_channels, c.sample_size, c.sample_size, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([3, 99]), torch.tensor([0, 1]) if c.num_class_embeds else None
    with torch.no_grad():
        return ours(x, t, labels), theirs(x, t, labels).sample


@pytest.mark.heavy
@pytest.mark.parametrize(
    "values",
    [
        CIFAR10,
        CIFAR10 | {"sample_size": (16, 16), "num_class_embeds": 2},
        {"sample_size": 8, "block_out_channels": (32, 32, 64, 32)},  # all other values are defaults
        {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 2,
            "block_out_channels": (16, 32),
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "norm_num_groups": 16,
            "attn_norm_num_groups": 16,
            "add_attention": False,
        },
    ],
)
@pytest.mark.parametrize("leave_out", [False, True])
def test_a_network_made_by_diffusers_loads_here_and_goes_back(tmp_path, values, leave_out):
    theirs = save_of_diffusers(tmp_path / "theirs", **values)
    if leave_out:  # as in folders written before the key was invented
        path = tmp_path / "theirs/unet/config.json"
        path.write_text(json.dumps({key: v for key, v in json.loads(path.read_text()).items() if key in values}))
    ours, diffusion, _ = load_model(tmp_path / "theirs")
    torch.testing.assert_close(*predictions(ours, theirs), rtol=1e-5, atol=1e-5)
    save_model(tmp_path / "ours", ours, diffusion, {})
    assert load_model(tmp_path / "ours").unet.config == ours.config
    again = UNet2DModel.from_pretrained(tmp_path / "ours/unet").eval()
    torch.testing.assert_close(*predictions(ours, again), rtol=1e-5, atol=1e-5)


def test_an_old_folder_with_old_names_of_attention_loads(tmp_path):
    """A folder like those of the first models of diffusers on the Hub."""
    theirs = save_of_diffusers(tmp_path / "new", **CIFAR10)
    weights = {}
    for name, value in theirs.state_dict().items():
        for old, new in OLD_NAMES.items():
            name = name.replace(new, old)
        weights[name] = value
    (tmp_path / "old").mkdir()
    save_file(weights, tmp_path / "old/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    for file in ("unet/config.json", "scheduler/scheduler_config.json"):
        shutil.copy(tmp_path / "new" / file, tmp_path / "old")
    assert "mid_block.attentions.0.proj_attn.weight" in weights
    torch.testing.assert_close(*predictions(load_model(tmp_path / "old").unet, theirs), rtol=1e-5, atol=1e-5)
    UNet2DModel.from_pretrained(tmp_path / "old")  # diffusers still reads it, too


def test_diffusers_draws_the_same_images_from_the_same_noise(tmp_path, monkeypatch):
    config = DiffusionConfig(20, "linear", "epsilon", 1e-3, 0.3)
    unet, diffusion = small_unet(channels=3), GaussianDiffusion(config)
    save_model(tmp_path, unet, config, {})
    noise = samplers.ImageNoise(0, range(2), unet.config, torch.device("cpu"))
    path = samplers.timesteps(20, 20, "leading")
    *_, last = samplers.ddpm(unet, diffusion, noise(), path, noise, variance="fixed_small")

    again = samplers.ImageNoise(0, range(2), unet.config, torch.device("cpu"))
    for module in ("pipelines.ddpm.pipeline_ddpm", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *_, **__: again())
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=20, output_type="np").images
    ours = (last.x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert 0.05 < ours.std() < 0.5  # neither grey nor all clipped
    np.testing.assert_allclose(images, ours, rtol=0, atol=1e-4)


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
    elif kind == "missing key":
        values = json.loads(config.read_text())
        del values["layers_per_block"]
        config.write_text(json.dumps(values))
    elif kind == "unsupported key":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"downsample_type": "resnet"}))
    elif kind == "no json":
        config.write_text("{")
    elif kind == "a list":
        config.write_text("[]")
    elif kind == "other schedule":
        path = folder / "scheduler/scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_schedule": "scaled_linear"}))
    elif kind == "no weights":
        weights.unlink()
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "other shape",
        "missing key",
        "unsupported key",
        "no json",
        "a list",
        "other schedule",
        "no weights",
        "no folder",
    ],
)
def test_a_damaged_model_folder_is_one_line_that_names_the_file(folder, kind):
    damage(folder, kind)
    with pytest.raises(UserError) as fault:
        load_model(folder)
    assert "\n" not in str(fault.value)
    assert str(folder) in str(fault.value)
    assert ".json" in str(fault.value) or ".safetensors" in str(fault.value)


def test_pickled_weights_are_never_read(folder):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    for read in (load_model, weights_sha256):
        with pytest.raises(UserError, match=r"model\.bin: is a pickle, .* never loaded; save it as safetensors"):
            read(folder)


def test_the_model_folder_records_its_data_and_parameters(folder):
    assert json.loads((folder / "training.json").read_text())["data"]["name"] == "digits"
    card = (folder / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "`training.json`" in card


def test_a_model_folder_that_does_not_name_its_run_is_refused(folder):
    save_model(folder, small_unet(), CONFIG, {"run": "0123456789abcdef"})
    assert training_run(folder) == "0123456789abcdef"
    (folder / "training.json").write_text("{}")
    with pytest.raises(UserError, match=r"training\.json: has no 'run'; run the stage train again"):
        training_run(folder)


def test_weights_are_safetensors_that_diffusers_reads(folder):
    UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)


@pytest.fixture
def trained(tmp_path):
    """A folder with the network that `train` trains."""
    save_model(tmp_path / "trained", small_unet(), CONFIG, {})
    return tmp_path / "trained"


@pytest.mark.process
def test_a_training_starts_from_the_weights_of_a_folder(tmp_path, trained):
    # steps that are too small to change a float: the weights stay those at the start, live and averaged
    still = ("train.steps=2", "train.warmup_steps=0", "train.log_every_steps=1", "optimizer.lr=1e-30")
    model, _ = train(tmp_path, f"train.init_from={trained}", *still)
    assert same(model, small_unet())
    assert model.config.dropout == 0.1  # of the parameters, not of the folder
    moved, _ = train(tmp_path, f"train.init_from={trained}", name="moved")
    fresh, _ = train(tmp_path, name="fresh")
    assert not same(moved, small_unet())
    assert not same(moved, fresh)


@pytest.mark.process
def test_a_resumed_training_continues_from_its_own_state(tmp_path, trained):
    init = f"train.init_from={trained}"
    whole, _ = train(tmp_path, init)
    with pytest.raises(Interrupted):
        train(tmp_path, init, stop_at=6, name="cut")
    resumed, _ = train(tmp_path, init, name="cut")
    assert same(whole, resumed)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"block_out_channels": (16, 16)}, r"block_out_channels = \(16, 16\), but .* ask for \(16, 32\)"),
        ({"norm_num_groups": 4}, "norm_num_groups = 4, but `model` and the data ask for 8"),
        ({"size": 16, "channels": 3}, "sample_size = 16, but .* 8"),
    ],
)
def test_another_network_is_refused_with_the_first_difference(tmp_path, changes, fault):
    save_model(tmp_path / "other", small_unet(**changes), CONFIG, {})
    with pytest.raises(UserError, match=f"^params.yaml: train.init_from = .*other: its network has {fault}$"):
        train(tmp_path, f"train.init_from={tmp_path / 'other'}")


def test_a_missing_folder_to_start_from_is_named(tmp_path):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(UserError, match=r"train\.init_from = '.*nowhere': there is no such folder; "):
        train(tmp_path, f"train.init_from={nowhere}")
    with pytest.raises(UserError, match=r"model\.safetensors: not found; this is not a model folder"):
        weights_sha256(nowhere)


@pytest.mark.process
def test_fine_tuning_distinguishes_weights_of_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    run_stage(prepare_data)
    short = ("train.steps=2", "train.warmup_steps=0", "train.preview_every_epochs=0")
    run_stage(train_stage, *short)
    with pytest.raises(
        UserError, match=r"train\.init_from = 'models/ddpm': is removed before each training; start from a"
    ):
        run_stage(train_stage, "train.init_from=models/ddpm")
    shutil.copytree("models/ddpm", "base")
    runs = []
    monkeypatch.setattr("ddpm.runtime.run.Tracker", lambda *arguments: runs.append(arguments[3]) or Tracker(*arguments))
    run_stage(train_stage, "train.init_from=base", *short)
    assert json.loads((tmp_path / "models/ddpm/training.json").read_text())["init_from"] == weights_sha256("base")
    unet, diffusion, _ = load_model("base")
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] += 1
    save_model("base", unet, diffusion, {})
    run_stage(train_stage, "train.init_from=base", *short)
    assert runs[0] != runs[1]


def test_the_names_of_the_classes_are_kept_with_the_model(tmp_path):
    unet = small_unet(num_class_embeds=3, has_no_label=True)
    save_model(tmp_path, unet, CONFIG, {}, ("cat", "dog"))
    loaded = load_model(tmp_path)
    assert loaded.classes == ("cat", "dog")
    assert loaded.unet.config == unet.config
    assert loaded.unet.config.no_label == 2
    assert "Classes, from 0 up: cat, dog." in (tmp_path / "README.md").read_text()
    theirs = UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    x, t, labels = torch.randn(3, 1, 8, 8), torch.arange(3), torch.tensor([0, 1, 2])
    torch.testing.assert_close(unet(x, t, labels), theirs(x, t, class_labels=labels).sample, rtol=1e-4, atol=1e-5)
    save_model(tmp_path / "plain", small_unet(), CONFIG, {})
    assert not (tmp_path / "plain/classes.json").exists()


@pytest.mark.parametrize("content", ["", "{}", '["cat"]', "3"])
def test_misfitting_class_names_are_reported_with_their_file(tmp_path, content):
    save_model(tmp_path, small_unet(num_class_embeds=3, has_no_label=True), CONFIG, {}, ("cat", "dog"))
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(UserError, match=r"classes\.json|class names"):
        load_model(tmp_path)


def test_a_model_with_unknown_class_names_can_start_a_training(tmp_path):
    save_model(tmp_path, small_unet(num_class_embeds=2), CONFIG, {})
    ours = small_unet(num_class_embeds=2)
    assert load_weights(tmp_path, ours.config, "v", ("cat", "dog")).keys() == ours.state_dict().keys()
    with pytest.raises(UserError, match=r"class_names = \('cat', 'dog'\), but .* ask for \('dog', 'cat'\)"):
        save_model(tmp_path, ours, CONFIG, {}, ("cat", "dog"))
        load_weights(tmp_path, ours.config, "v", ("dog", "cat"))


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ({"num_class_embeds": 3}, ("cat", "dog")),
        ({"num_class_embeds": 3, "has_no_label": True}, ()),  # without names it would be read as a third class
        ({}, ("cat",)),
    ],
)
def test_class_names_that_are_not_one_per_class_are_not_written(tmp_path, network, names):
    with pytest.raises(ValueError, match=f"^{len(names)} class names for a network of"):
        save_model(tmp_path, small_unet(**network), CONFIG, {}, names)
    assert not list(tmp_path.iterdir())


def test_a_start_from_another_prediction_gives_a_warning(tmp_path, capsys):
    save_model(tmp_path, small_unet(), CONFIG, {})
    for prediction in ("epsilon", "x0", "v"):
        load_weights(tmp_path, small_unet().config, prediction)
        warning = capsys.readouterr().err
        assert (warning == "") == (prediction == CONFIG.prediction)
        assert warning.count("\n") <= 1


def test_an_impossible_schedule_is_refused_with_its_file(tmp_path):
    save_model(tmp_path, small_unet(), DiffusionConfig(50, "linear", "v"), {})
    path = tmp_path / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 100_000, "beta_end": 0.9}))
    fault = (
        f"{path}: the linear schedule with timesteps = 100000, beta_start = 0.0001 and beta_end = 0.9: alpha_bar runs"
    )
    with pytest.raises(UserError, match=re.escape(fault)) as refused:
        load_model(tmp_path)
    assert "\n" not in str(refused.value)


WIDTHS = {"params": {"train": {"ema_widths": [0.1, 0.05, 0.0]}}}


@pytest.fixture
def averages(tmp_path):
    """A folder of three averages, the first of which is `small_unet()`."""
    others = {width: shifted(small_unet(), width + 1) for width in (0.05, 0.0)}
    save_model(tmp_path / "model", small_unet(), CONFIG, WIDTHS, others=others)
    return tmp_path / "model"


def shifted(unet, by):
    with torch.no_grad():
        unet.conv_in.weight += by
    return unet


def test_each_average_of_the_weights_is_loaded_by_its_width(averages):
    first = load_model(averages).unet.conv_in.weight
    for width, by in ((0.1, 0), (0.05, 1.05), (0.0, 1.0)):
        torch.testing.assert_close(load_model(averages, width).unet.conv_in.weight, first + by)
    assert len({weights_sha256(averages, width) for width in (None, 0.1, 0.05, 0.0)}) == 3


def test_diffusers_loads_the_averages_as_variants(averages):
    for variant, width in ((None, None), ("ema-0.05", 0.05), ("live", 0.0)):
        theirs = UNet2DModel.from_pretrained(averages, subfolder="unet", variant=variant)
        assert torch.equal(theirs.conv_in.weight, load_model(averages, width).unet.conv_in.weight)


def test_a_missing_average_is_reported_with_the_existing_ones(averages):
    with pytest.raises(UserError, match=r"sample\.ema_width = 0\.2: .* holds the averages \[0\.1, 0\.05, 0\.0\]"):
        load_model(averages, 0.2)
    (averages / "unet/diffusion_pytorch_model.live.safetensors").unlink()
    with pytest.raises(UserError, match=r"sample\.ema_width = 0\.0: "):
        load_model(averages, 0.0)


@pytest.mark.parametrize("params", [None, 3, {}, {"train": 1}, {"train": {"ema_widths": "x"}}])
def test_a_folder_without_a_list_of_averages_has_only_its_first(tmp_path, params):
    save_model(tmp_path, small_unet(), CONFIG, {"params": params})
    load_model(tmp_path)
    with pytest.raises(UserError, match=r"names no averages in training\.json; set it to null for the first"):
        load_model(tmp_path, 0.1)
