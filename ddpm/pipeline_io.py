"""The model folder: loads in diffusers (`DDPMPipeline.from_pretrained`) and here, with no conversion and no pickle."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ddpm.diffusion import DiffusionConfig
from ddpm.errors import UserError
from ddpm.unet import UNet, UNetConfig

WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")
UNET_CONFIG = Path("unet", "config.json")
SCHEDULER_CONFIG = Path("scheduler", "scheduler_config.json")
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
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
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "README.md").write_text(_card(unet, diffusion, provenance), encoding="utf-8")


def load_model(folder: str | Path) -> tuple[UNet, DiffusionConfig]:
    """Read a model folder, ours or of diffusers: the network in evaluation mode, and its diffusion.

    Raises:
        UserError: a file is missing, damaged, or asks for what this U-Net has not; the line names it.
    """
    folder = Path(folder)
    unet_json, diffusion_json = _read_json(folder / UNET_CONFIG), _read_json(folder / SCHEDULER_CONFIG)
    try:
        unet = UNet(_unet_from_json(unet_json))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / UNET_CONFIG}: {_reason(error)}") from None
    try:
        diffusion = _diffusion_from_json(diffusion_json)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / SCHEDULER_CONFIG}: {_reason(error)}") from None
    try:
        unet.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder / WEIGHTS}: {' '.join(str(error).split())[:300]}") from None
    return unet.eval().requires_grad_(False), diffusion


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
    down = ["AttnDownBlock2D" if flag else "DownBlock2D" for flag in config.attention]
    up = ["AttnUpBlock2D" if flag else "UpBlock2D" for flag in reversed(config.attention)]
    values = {key: value for key, value in asdict(config).items() if key != "attention"}
    return values | {
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "down_block_types": down,
        "up_block_types": up,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "time_embedding_type": "positional",
    }


def _unet_from_json(value: dict[str, Any]) -> UNetConfig:
    down, up = value["down_block_types"], value["up_block_types"]
    attention = tuple(name == "AttnDownBlock2D" for name in down)
    fixed = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
    for key, needed in fixed.items():
        if value.get(key) != needed:
            raise ValueError(f"{key} = {value.get(key)!r}: this U-Net has {needed!r}")
    if not set(down) <= {"DownBlock2D", "AttnDownBlock2D"} or not set(up) <= {"UpBlock2D", "AttnUpBlock2D"}:
        raise ValueError(f"blocks {down} and {up}: only Down, AttnDown, Up and AttnUp blocks are known")
    if [name == "AttnUpBlock2D" for name in reversed(up)] != list(attention):
        raise ValueError(f"blocks {down} and {up}: attention must be at the same levels going down and up")
    return UNetConfig(
        sample_size=value["sample_size"],
        in_channels=value["in_channels"],
        out_channels=value["out_channels"],
        block_out_channels=tuple(value["block_out_channels"]),
        layers_per_block=value["layers_per_block"],
        attention=attention,
        dropout=value.get("dropout", 0.0),
        norm_num_groups=value["norm_num_groups"],
        norm_eps=value["norm_eps"],
        attention_head_dim=value["attention_head_dim"],
    )


def _diffusion_to_json(config: DiffusionConfig) -> dict[str, Any]:
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": config.timesteps,
        "beta_schedule": SCHEDULES[config.schedule],
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "prediction_type": PREDICTIONS[config.prediction],
        "variance_type": "fixed_small",
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
    )
