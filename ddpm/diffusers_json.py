"""The values of diffusers' two configuration files, from our configurations and back. Reads and writes no file."""

import json
from dataclasses import asdict, fields, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ddpm.config.targets import shown
from ddpm.core.diffusion import DiffusionConfig
from ddpm.core.unet import UNetConfig

# diffusers' own values of the keys that a config.json may leave out; see UNet2DModel
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "add_attention": True,
    "num_class_embeds": None,
}
# keys for which this U-Net supports only some values; the first is also diffusers' default
KNOWN: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DModel",),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
    "downsample_type": ("conv",),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2D",),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "upsample_type": ("conv",),
}
BLOCKS = {  # the block of a level without attention, and that of a level with it
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
}
MOST_LAYERS = 1000  # per level; a file that claims more is damaged
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}
PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


def unet_to_json(config: UNetConfig) -> dict[str, Any]:
    """The values of unet/config.json, from which `UNet2DModel` of diffusers builds the same network."""
    values = asdict(config)
    for ours in ("attention", "up_attention", "has_no_label"):
        del values[ours]
    return values | {
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "down_block_types": ["AttnDownBlock2D" if flag else "DownBlock2D" for flag in config.attention],
        "up_block_types": ["AttnUpBlock2D" if flag else "UpBlock2D" for flag in reversed(config.up_flags)],
        "time_embedding_type": "positional",
    }


def unet_from_json(values: dict[str, Any]) -> UNetConfig:
    """The network that the values of a unet/config.json describe; a key that is left out has diffusers' default.

    Raises:
        ValueError: the file asks for something this U-Net does not support; the message names the key, its value, and
            the values that are known.
    """
    values = DEFAULTS | values
    widths, groups, size = (values[key] for key in ("block_out_channels", "norm_num_groups", "sample_size"))
    first = widths[0] if isinstance(widths, list) and widths and isinstance(widths[0], int) else 0
    known = KNOWN | {"attn_norm_num_groups": (None, groups), "time_embedding_dim": (None, first * 4)}
    for key, allowed in known.items():
        if values.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{key} = {shown(values[key])}: known here: {', '.join(map(repr, allowed))}")
    flags = {}
    for key, names in BLOCKS.items():
        blocks = values[key]
        if not blocks or not isinstance(blocks, list) or not set(map(str, blocks)) <= set(names):
            raise ValueError(f"{key} = {shown(blocks)}: known here: a list of {' and '.join(names)}")
        flags[key] = [name == names[1] for name in blocks]
    if isinstance(values["layers_per_block"], int) and values["layers_per_block"] > MOST_LAYERS:
        raise ValueError(f"layers_per_block = {shown(values['layers_per_block'])}: at most {MOST_LAYERS}")
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        values["sample_size"] = size[0]
    ours = {field.name: values[field.name] for field in fields(UNetConfig) if field.name in DEFAULTS}
    down, up = flags["down_block_types"], flags["up_block_types"][::-1]
    ours |= {"attention": down, "up_attention": None if up == down else up}
    try:
        return TypeAdapter(UNetConfig).validate_json(json.dumps(ours), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        where = f"{'.'.join(map(str, fault['loc']))} = {shown(fault['input'])}: " if fault["loc"] else ""
        raise ValueError(f"{where}{fault['msg'].removeprefix('Value error, ')}") from None


def with_classes(config: UNetConfig, names: int) -> UNetConfig:
    """Set `has_no_label`, for which diffusers has no key: one label more than class names stands for no label.

    Args:
        names: number of class names in the model folder; 0 where it has none.

    Raises:
        ValueError: the network has fewer labels than there are names, or more than one label beyond them.
    """
    if names and config.num_class_embeds not in (names, names + 1):
        raise ValueError(f"num_class_embeds = {config.num_class_embeds}: does not fit the {names} class names")
    return replace(config, has_no_label=bool(names) and config.num_class_embeds == names + 1)


def diffusion_to_json(config: DiffusionConfig) -> dict[str, Any]:
    """The values of scheduler/scheduler_config.json, from which `DDPMScheduler` of diffusers samples the same way."""
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": config.timesteps,
        "beta_schedule": SCHEDULES[config.schedule],
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "prediction_type": PREDICTIONS[config.prediction],
        "variance_type": "learned_range" if config.learn_variance else "fixed_small",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "timestep_spacing": "leading",
    }


def diffusion_from_json(value: dict[str, Any]) -> DiffusionConfig:
    """The diffusion that the values of a scheduler/scheduler_config.json describe.

    Raises:
        KeyError: a key is missing.
        ValueError: a value is not known here, or out of bounds; the message names its key.
    """
    schedules = {theirs: ours for ours, theirs in SCHEDULES.items()}
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    schedule, prediction = str(value["beta_schedule"]), str(value.get("prediction_type", "epsilon"))
    for key, name, known in (("beta_schedule", schedule, schedules), ("prediction_type", prediction, predictions)):
        if name not in known:
            raise ValueError(f"{key} = {shown(name)}: known here: {', '.join(known)}")
    steps, start, end = (value[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    if type(steps) is not int or not 2 <= steps <= 100_000:
        raise ValueError(f"num_train_timesteps = {shown(steps)}: must be an integer from 2 to 100000")
    if not all(type(beta) in (int, float) and 0 < beta < 1 for beta in (start, end)):
        raise ValueError(f"beta_start = {shown(start)}, beta_end = {shown(end)}: must be numbers between 0 and 1")
    return DiffusionConfig(
        timesteps=steps,
        schedule=schedules[schedule],  # type: ignore[arg-type]
        prediction=predictions[prediction],  # type: ignore[arg-type]
        beta_start=start,
        beta_end=end,
        learn_variance=value.get("variance_type") == "learned_range",
    )
