import pytest

from ddpm.core.diffusion import DiffusionConfig
from ddpm.core.unet import UNet
from ddpm.diffusers_json import diffusion_from_json, diffusion_to_json, unet_from_json, unet_to_json, with_classes
from tests.conftest import small_unet

SCHEDULER = diffusion_to_json(DiffusionConfig(50, "linear", "epsilon"))


def unet_values():
    """The values of a config.json as they are read: JSON has lists, and no tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in unet_to_json(small_unet().config).items()}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("learn_variance", [False, True])
def test_every_diffusion_comes_back(schedule, prediction, learn_variance):
    config = DiffusionConfig(50, schedule, prediction, 1e-3, 0.3, learn_variance)
    assert diffusion_from_json(diffusion_to_json(config)) == config


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name = 'UNet2DConditionModel': known here: 'UNet2DModel'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift = 'scale_shift': known here: 'default'"),
        ({"downsample_type": "resnet"}, "downsample_type = 'resnet': known here: 'conv'"),
        ({"upsample_type": "resnet"}, "upsample_type = 'resnet': known here: 'conv'"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu': known here: 'silu', 'swish'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier': known here: 'positional'"),
        ({"time_embedding_dim": 32}, "time_embedding_dim = 32: known here: None, 64"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep': known here: None"),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups = 4: known here: None, 8"),
        ({"mid_block_scale_factor": 1.5}, "mid_block_scale_factor = 1.5: known here: 1"),
        ({"mid_block_type": None}, "mid_block_type = None: known here: 'UNetMidBlock2D'"),
        ({"down_block_types": ["DownBlock2D", "KDownBlock2D"]}, "down_block_types = ['DownBlock2D', 'KDownBlock2D']: "),
        ({"up_block_types": ["SkipUpBlock2D", "UpBlock2D"]}, "known here: a list of UpBlock2D and AttnUpBlock2D"),
        ({"up_block_types": 3}, "up_block_types = 3: known here: a list of UpBlock2D and AttnUpBlock2D"),
        ({"up_block_types": []}, "up_block_types = []: known here: a list of"),
        ({"up_block_types": ["UpBlock2D"]}, "2 block_out_channels, 2 blocks down and 1 up"),
        ({"downsample_padding": 2}, "downsample_padding = 2: only 0 and 1 are known"),
        ({"attention_head_dim": 24}, "attention_head_dim = 24: must divide"),
        ({"sample_size": None}, "sample_size = None: "),
        ({"sample_size": [8, 16]}, "sample_size = [8, 16]: "),
        ({"norm_num_groups": None}, "norm_num_groups = None: "),
        ({"layers_per_block": "1"}, "layers_per_block = '1': "),
        ({"block_out_channels": 16}, "block_out_channels = 16: "),
        ({"block_out_channels": [16, True]}, "block_out_channels.1 = True: "),
        ({"norm_eps": float("nan")}, "norm_eps = nan: must be above 0"),
    ],
)
def test_an_unsupported_key_is_refused_with_its_choices(changes, fault):
    with pytest.raises(ValueError) as refused:
        UNet(unet_from_json(unet_values() | changes))
    assert fault in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"beta_schedule": "scaled_linear"}, "beta_schedule = 'scaled_linear': known here: linear, squaredcos_cap_v2"),
        ({"prediction_type": "flow"}, "prediction_type = 'flow': known here: epsilon, sample, v_prediction"),
        ({"num_train_timesteps": 1}, "num_train_timesteps = 1: must be an integer from 2 to 100000"),
        ({"num_train_timesteps": 50.0}, "num_train_timesteps = 50.0: must be an integer"),
        ({"beta_end": 1}, "beta_start = 0.0001, beta_end = 1: must be numbers between 0 and 1"),
        ({"beta_start": "0.1"}, "beta_start = '0.1', beta_end = 0.02: must be numbers"),
    ],
)
def test_an_unknown_scheduler_value_is_refused(changes, fault):
    with pytest.raises(ValueError) as refused:
        diffusion_from_json(SCHEDULER | changes)
    assert str(refused.value).startswith(fault)


@pytest.mark.parametrize(
    ("labels", "names", "has_no_label"), [(3, 0, False), (3, 3, False), (3, 2, True), (None, 0, False)]
)
def test_one_label_beyond_the_class_names_stands_for_none(labels, names, has_no_label):
    config = small_unet(num_class_embeds=labels).config
    assert with_classes(config, names).has_no_label == has_no_label


@pytest.mark.parametrize(("labels", "names"), [(3, 1), (3, 4), (None, 2)])
def test_class_names_that_do_not_fit_the_labels_are_refused(labels, names):
    with pytest.raises(ValueError, match=f"does not fit the {names} class names"):
        with_classes(small_unet(num_class_embeds=labels).config, names)
