"""The model folder: loads in diffusers (`DDPMPipeline.from_pretrained`) and here, with no conversion and no pickle."""

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ddpm.diffusion import DiffusionConfig
from ddpm.errors import UserError
from ddpm.unet import UNet, UNetConfig

WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")
UNET_CONFIG = Path("unet", "config.json")
SCHEDULER_CONFIG = Path("scheduler", "scheduler_config.json")
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
# the keys of which this U-Net has not every choice; the first is also diffusers' default
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
BLOCKS = {  # without and with attention
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
}
# attention's layers, as early versions of diffusers named them; it still reads these names, too
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}
PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


def save_model(folder: str | Path, unet: UNet, diffusion: DiffusionConfig, provenance: dict[str, Any]) -> None:
    """Write weights, both configurations and a model card with `provenance` (plain values: data, parameters).

    The same model and provenance give the same bytes.
    """
    folder = Path(folder)
    for part in ("unet", "scheduler"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
    )
    _write_json(folder / UNET_CONFIG, _unet_to_json(unet.config))
    _write_json(folder / SCHEDULER_CONFIG, _diffusion_to_json(diffusion))
    weights = {name: value.detach().cpu().contiguous() for name, value in unet.state_dict().items()}
    # (save_file reports a full disk as an error of its own, without its number)
    (folder / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))
    (folder / "README.md").write_text(_card(unet, diffusion, provenance), encoding="utf-8")


def load_model(folder: str | Path) -> tuple[UNet, DiffusionConfig]:
    """Read a model folder, ours or of diffusers: the network in evaluation mode, and its diffusion.

    Raises:
        UserError: a file is missing, damaged, or asks for what this U-Net has not; the line names it.
    """
    folder = Path(folder)
    unet_path, diffusion_path = _find(folder, UNET_CONFIG), _find(folder, SCHEDULER_CONFIG)
    unet_json, diffusion_json = _read_json(unet_path), _read_json(diffusion_path)
    try:
        unet = UNet(_unet_from_json(unet_json))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{unet_path}: {_reason(error)}") from None
    try:
        diffusion = _diffusion_from_json(diffusion_json)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{diffusion_path}: {_reason(error)}") from None
    weights_path = _weights_path(folder)
    try:
        unet.load_state_dict({_new_name(name): value for name, value in load_file(weights_path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{weights_path}: {' '.join(str(error).split())[:300]}") from None
    return unet.eval().requires_grad_(False), diffusion


def load_weights(folder: str | Path, config: UNetConfig) -> dict[str, Tensor]:
    """The weights of a model folder, to start the training of a network of this configuration.

    Raises:
        UserError: as for `load_model`, or the folder's network is another one, dropout apart; the line names the
            first field that differs.
    """
    try:
        unet, _ = load_model(folder)
    except UserError as error:
        raise UserError(f"params.yaml: train.init_from: {error}") from None
    for field in fields(UNetConfig):
        there, here = getattr(unet.config, field.name), getattr(config, field.name)
        if there != here and field.name != "dropout":
            raise UserError(
                f"params.yaml: train.init_from = {folder}: its network has {field.name} = {there}, and the one that "
                f"`model` and the data ask for {here}"
            )
    return unet.state_dict()


def weights_sha256(folder: str | Path) -> str:
    """What identifies the weights that a training starts from.

    Raises:
        UserError: there are none.
    """
    try:
        path = _weights_path(Path(folder))
    except UserError as error:
        raise UserError(f"params.yaml: train.init_from: {error}") from None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find(folder: Path, path: Path) -> Path:
    """The file in its part's folder, or in the folder itself, where the first models for diffusers have it."""
    flat = folder / path.name
    return flat if flat.is_file() and not (folder / path).exists() else folder / path


def _weights_path(folder: Path) -> Path:
    path = _find(folder, WEIGHTS)
    if path.is_file():
        return path
    pickled = _find(folder, WEIGHTS.with_suffix(".bin"))
    if pickled.exists():
        raise UserError(
            f"{pickled}: is a pickle, which could run any code and is never loaded; save it as safetensors "
            f"(save_pretrained of diffusers does)"
        )
    raise UserError(f"{path}: not found; this is no model folder, or train was not run")


def _new_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _card(unet: UNet, diffusion: DiffusionConfig, provenance: dict[str, Any]) -> str:
    config = unet.config
    facts = OmegaConf.to_yaml(OmegaConf.create(provenance))
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [ddpm, unconditional-image-generation]
---

# DDPM, {config.sample_size}x{config.sample_size}, {config.in_channels} channels

A denoising diffusion model (Ho et al. 2020): {sum(p.numel() for p in unet.parameters()):,} parameters,
{diffusion.timesteps} timesteps, {diffusion.schedule} schedule, {diffusion.prediction} prediction.
The weights are the exponential moving average of the training.

```python
from diffusers import DDPMPipeline

images = DDPMPipeline.from_pretrained("models/ddpm")(batch_size=4).images
```

## What it was made from

```yaml
{facts}```
"""


def _reason(error: Exception) -> str:
    return f"has no {error}" if isinstance(error, KeyError) else str(error)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; this is no model folder, or train was not run") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is no JSON object")
    return value


def _unet_to_json(config: UNetConfig) -> dict[str, Any]:
    values = asdict(config)
    down, up = values.pop("attention"), values.pop("up_attention")
    return values | {
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "down_block_types": ["AttnDownBlock2D" if flag else "DownBlock2D" for flag in down],
        "up_block_types": ["AttnUpBlock2D" if flag else "UpBlock2D" for flag in reversed(up)],
        "time_embedding_type": "positional",
    }


def _unet_from_json(values: dict[str, Any]) -> UNetConfig:
    """The configuration that a config.json of diffusers describes; a key that it leaves out has diffusers' default.

    Raises:
        ValueError: it asks for what this U-Net has not, naming the key, its value and what is known.
    """
    values = DEFAULTS | values
    widths, groups, size = (values[key] for key in ("block_out_channels", "norm_num_groups", "sample_size"))
    first = widths[0] if isinstance(widths, list) and widths and isinstance(widths[0], int) else 0
    known = KNOWN | {"attn_norm_num_groups": (None, groups), "time_embedding_dim": (None, first * 4)}
    for key, allowed in known.items():
        if values.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{key} = {values[key]!r}: known here: {', '.join(map(repr, allowed))}")
    flags = {}
    for key, names in BLOCKS.items():
        blocks = values[key]
        if not blocks or not isinstance(blocks, list) or not set(map(str, blocks)) <= set(names):
            raise ValueError(f"{key} = {blocks!r}: known here: a list of {' and '.join(names)}")
        flags[key] = [name == names[1] for name in blocks]
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        values["sample_size"] = size[0]
    ours = {field.name: values[field.name] for field in fields(UNetConfig) if field.name in values}
    ours |= {"attention": flags["down_block_types"], "up_attention": flags["up_block_types"][::-1]}
    try:
        return TypeAdapter(UNetConfig).validate_json(json.dumps(ours), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        where = f"{'.'.join(map(str, fault['loc']))} = {fault['input']!r}: " if fault["loc"] else ""
        raise ValueError(f"{where}{fault['msg'].removeprefix('Value error, ')}") from None


def _diffusion_to_json(config: DiffusionConfig) -> dict[str, Any]:
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


def _diffusion_from_json(value: dict[str, Any]) -> DiffusionConfig:
    schedules = {theirs: ours for ours, theirs in SCHEDULES.items()}
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    schedule, prediction = value["beta_schedule"], value.get("prediction_type", "epsilon")
    if schedule not in schedules or prediction not in predictions:
        raise ValueError(f"beta_schedule {schedule!r} or prediction_type {prediction!r} is not known here")
    return DiffusionConfig(
        timesteps=value["num_train_timesteps"],
        schedule=schedules[schedule],  # type: ignore[arg-type]
        prediction=predictions[prediction],  # type: ignore[arg-type]
        beta_start=value["beta_start"],
        beta_end=value["beta_end"],
        learn_variance=value.get("variance_type") == "learned_range",
    )
