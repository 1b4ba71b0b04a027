"""The model folder: loads in diffusers (`DDPMPipeline.from_pretrained`) and here, with no conversion and no pickle."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion, Prediction
from ddpm.core.unet import UNet, UNetConfig
from ddpm.diffusers_json import diffusion_from_json, diffusion_to_json, unet_from_json, unet_to_json, with_classes
from ddpm.errors import UserError
from ddpm.files import write_file

WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")
UNET_CONFIG = Path("unet", "config.json")
SCHEDULER_CONFIG = Path("scheduler", "scheduler_config.json")
TRAINING = Path("training.json")  # what the model was made from
CLASSES = Path("classes.json")  # the names of a class-conditional model's classes; diffusers has no place for them
# the names of attention's layers in early versions of diffusers, which it still reads
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
NO_WIDTH = {"sample.ema_width": "set it to null for the first", "evaluate.ema_widths": "leave it out"}


class TrainedModel(NamedTuple):
    """The content of a model folder: a network in evaluation mode, its diffusion, and the names of its classes.

    `classes` is empty for an unconditional network, and where the folder names none.
    """

    unet: UNet
    diffusion: DiffusionConfig
    classes: tuple[str, ...]


def save_model(
    folder: str | Path,
    unet: UNet,
    diffusion: DiffusionConfig,
    provenance: dict[str, Any],
    classes: Sequence[str] = (),
    others: Mapping[float, UNet] | None = None,
) -> None:
    """Write weights, both configurations, a model card, and what the model was made from.

    The same model, provenance and classes give the same bytes.

    Args:
        unet: the network that is loaded by default.
        provenance: plain values: the run's name, data, parameters.
        others: further averages of the weights, by their widths (see `ddpm.core.ema`). diffusers loads one as a
            variant: `UNet2DModel.from_pretrained(folder, subfolder="unet", variant="ema-0.05")`, or "live" for 0.
        classes: the names of the network's classes; needed where one of its labels stands for no label.

    Raises:
        ValueError: the number of names is not the number of classes.
    """
    folder, config = Path(folder), unet.config
    if len(classes) != config.classes and (classes or config.has_no_label):
        raise ValueError(f"{len(classes)} class names for a network of {config.classes} classes")
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
    )
    _write_json(folder / UNET_CONFIG, unet_to_json(config))
    _write_json(folder / SCHEDULER_CONFIG, diffusion_to_json(diffusion))
    if classes:
        _write_json(folder / CLASSES, list(classes))
    for path, network in [(WEIGHTS, unet), *((_variant(width), other) for width, other in (others or {}).items())]:
        weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
        write_file(folder / path, save(weights, metadata={"format": "pt"}))
    _write_json(folder / TRAINING, provenance)
    write_file(folder / "README.md", _card(unet, diffusion, classes).encode())


def load_model(folder: str | Path, width: float | None = None, setting: str = "sample.ema_width") -> TrainedModel:
    """Read a model folder, one of ours or one of diffusers'.

    Args:
        width: the width of the average of the weights to load; None: the folder's first.
        setting: the setting that asks for the width, to name it where the folder lacks that average.

    Raises:
        UserError: a file is missing, damaged, or asks for something this U-Net does not support; the line names it.
    """
    folder = Path(folder)
    unet_path, diffusion_path = _find(folder, UNET_CONFIG), _find(folder, SCHEDULER_CONFIG)
    unet_json, diffusion_json = _read_json(unet_path), _read_json(diffusion_path)
    classes = tuple(map(str, _read_json(folder / CLASSES, list))) if (folder / CLASSES).exists() else ()
    try:
        with torch.device("meta"):  # no memory is taken for what the file only claims
            unet = UNet(with_classes(unet_from_json(unet_json), len(classes)))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{unet_path}: {_reason(error)}") from None
    try:
        diffusion = diffusion_from_json(diffusion_json)
        GaussianDiffusion(diffusion)  # refuses a schedule that floats cannot hold
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{diffusion_path}: {_reason(error)}") from None
    weights_path = _weights_path(folder, width, setting)
    try:
        weights = {_new_name(name): value.float() for name, value in load_file(weights_path).items()}
        unet.load_state_dict(weights, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{weights_path}: {' '.join(str(error).split())[:300]}") from None
    return TrainedModel(unet.eval().requires_grad_(False), diffusion, classes)


def load_weights(
    folder: str | Path, config: UNetConfig, prediction: Prediction, classes: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The weights of a model folder, to start the training of a network of this configuration and these classes.

    A folder whose network predicts something else can be started from, with a warning.

    Raises:
        UserError: as for `load_model`, or the folder's network is another one, dropout apart; the line names the
            first field that differs. (A folder without class names fits any names.)
    """
    try:
        unet, diffusion, names = load_model(folder)
    except UserError as error:
        raise UserError(f"params.yaml: train.init_from: {error}") from None
    theirs, ours = (asdict(c) | {"up_attention": c.up_flags} for c in (unet.config, config))
    if names:
        theirs["class_names"], ours["class_names"] = names, tuple(classes)
    for name, there in theirs.items():
        # dropout has no weights, and the class names determine which label stands for none
        if there != ours[name] and name not in ("dropout", "has_no_label"):
            raise UserError(
                f"params.yaml: train.init_from = {folder}: its network has {name} = {there}, but `model` and the data "
                f"ask for {ours[name]}"
            )
    if diffusion.prediction != prediction:
        print(
            f"warning: {folder} predicts {diffusion.prediction}; with diffusion.prediction = {prediction} the network "
            f"has to relearn its output",
            file=sys.stderr,
        )
    return unet.state_dict()


def training_run(folder: str | Path) -> str:
    """The name of the run that made the model; the other stages record into the same run.

    Raises:
        UserError: training.json names no run.
    """
    path = Path(folder, TRAINING)
    run = _read_json(path).get("run")
    if not isinstance(run, str):
        raise UserError(f"{path}: has no 'run'; run the stage train again")
    return run


def class_counts(folder: str | Path) -> tuple[int, ...]:
    """The number of the model's training images per class; empty where training.json does not hold it."""
    data = _read_json(Path(folder, TRAINING)).get("data")
    counts = data.get("class_counts") if isinstance(data, dict) else None
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        return ()
    return tuple(counts)


def weights_sha256(folder: str | Path, width: float | None = None) -> str:
    """The SHA-256 of the file of the weights; `width` as for `load_model`.

    Raises:
        UserError: the folder holds no such weights.
    """
    with _weights_path(Path(folder), width).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find(folder: Path, path: Path) -> Path:
    """The file in the sub-folder of its part, or in the folder itself, as in the first models for diffusers."""
    flat = folder / path.name
    return flat if flat.is_file() and not (folder / path).exists() else folder / path


def _variant(width: float) -> Path:
    """The file of the average of this width, where it is not the first; named as diffusers' `variant`."""
    name = f"ema-{width:g}" if width else "live"
    return WEIGHTS.with_suffix(f".{name}{WEIGHTS.suffix}")


def _weights_path(folder: Path, width: float | None = None, setting: str = "sample.ema_width") -> Path:
    path = _find(folder, WEIGHTS)
    if path.is_file() and width is not None:
        widths = _widths(folder)
        if width not in widths or not (width == widths[0] or (folder / _variant(width)).is_file()):
            held = f"holds the averages {widths}" if widths else "names no averages in training.json"
            raise UserError(f"params.yaml: {setting} = {width}: {folder} {held}; {NO_WIDTH[setting]}")
        return path if width == widths[0] else folder / _variant(width)
    if path.is_file():
        return path
    pickled = _find(folder, WEIGHTS.with_suffix(".bin"))
    if pickled.exists():
        raise UserError(
            f"{pickled}: is a pickle, which could run any code and is never loaded; save it as safetensors "
            f"(save_pretrained of diffusers does)"
        )
    raise UserError(f"{path}: not found; this is not a model folder, or train was not run")


def _widths(folder: Path) -> list[float]:
    """The widths of the averages in a model folder, the default first; empty where training.json does not hold them."""
    value: Any = _read_json(folder / TRAINING)
    for key in ("params", "train", "ema_widths"):
        value = value.get(key) if isinstance(value, dict) else None
    return [width for width in value if type(width) in (int, float)] if isinstance(value, list) else []


def _new_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _card(unet: UNet, diffusion: DiffusionConfig, classes: Sequence[str]) -> str:
    config = unet.config
    use = """from diffusers import DDPMPipeline

images = DDPMPipeline.from_pretrained("models/ddpm")(batch_size=4).images"""
    if config.classes:  # diffusers has no pipeline that draws from such a U-Net
        use = """from diffusers import UNet2DModel

unet = UNet2DModel.from_pretrained("models/ddpm/unet")
output = unet(x_t, t, class_labels=labels).sample"""
    names = f"\nClasses, from 0 up: {', '.join(classes)}.\n" if classes else ""
    if config.no_label is not None:
        names += f"Label {config.no_label} stands for no label, for guidance.\n"
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [ddpm, unconditional-image-generation]
---

# DDPM, {config.sample_size}x{config.sample_size}, {config.in_channels} channels

A denoising diffusion model (Ho et al. 2020): {sum(p.numel() for p in unet.parameters()):,} parameters,
{diffusion.timesteps} timesteps, {diffusion.schedule} schedule, {diffusion.prediction} prediction.
The weights are an average over the training's last steps. Data and parameters: `{TRAINING}`.
{names}
```python
{use}
```
"""


def _reason(error: Exception) -> str:
    return f"has no {error}" if isinstance(error, KeyError) else str(error)


def _write_json(path: Path, value: dict[str, Any] | list[str]) -> None:
    write_file(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def _read_json(path: Path, kind: type = dict) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; this is not a model folder, or train was not run") from None
    if not isinstance(value, kind):
        raise UserError(f"{path}: is not a JSON {'object' if kind is dict else 'array'}")
    return value
