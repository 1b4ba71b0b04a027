"""The parameters: one typed schema for `params.yaml`, checked before anything else is done.

This module imports neither torch nor numpy: a wrong value has to stop a stage within two seconds, and the
environment that makes results reproducible has to be set before either is loaded.
"""

import difflib
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from yaml import YAMLError

from ddpm.errors import UserError
from ddpm.targets import LR_SCHEDULER, OPTIMIZER, TRANSFORM, Kind, target_fault

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Unknown keys are refused and nothing is converted: `"3"` is no integer, `3.0` neither."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Runtime(Section):
    device: Literal["auto", "cpu", "cuda"]
    reproducible: bool


class Dataset(Section):
    name: Literal["digits", "cifar10", "mnist", "fashion_mnist", "folder"]
    path: Annotated[str, Field(min_length=1)]
    image_size: Annotated[int, Field(ge=4, le=1024)]
    channels: Literal[1, 3]
    test_fraction: Fraction
    subset: Count | Fraction | None
    on_broken: Literal["stop", "skip"]


class Model(Section):
    base_channels: Count
    channel_multipliers: Annotated[list[Count], Field(min_length=1, max_length=8)]
    blocks_per_level: Count
    attention_resolutions: list[Count]
    dropout: Probability
    norm_groups: Count


class Diffusion(Section):
    timesteps: Annotated[int, Field(ge=2, le=100_000)]
    schedule: Literal["linear", "cosine"]
    beta_start: Fraction
    beta_end: Fraction
    prediction: Literal["epsilon", "x0", "v"]

    @model_validator(mode="after")
    def _betas_rise(self) -> "Diffusion":
        if self.beta_start >= self.beta_end:
            raise ValueError(f"beta_start must be below beta_end ({self.beta_end})")
        return self


class Instance(BaseModel):
    """An object named by `_target_`, with its own arguments beside it."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)
    target: str = Field(alias="_target_")


class Optimizer(Instance):
    lr: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _bounds(self) -> "Optimizer":
        extra = self.model_extra or {}
        for name, low, high in (("momentum", 0, 1), ("weight_decay", 0, float("inf")), ("eps", 0, float("inf"))):
            value = extra.get(name)
            if value is not None and not (_is_number(value) and low <= value < high):
                raise ValueError(f"{name} must be a number in [{low}, {high})")
        betas = extra.get("betas")
        if betas is not None and not (
            isinstance(betas, list)
            and len(betas) == 2
            and all(map(_is_number, betas))
            and 0 <= betas[0] < betas[1] < 1
        ):
            raise ValueError("betas must be two numbers with 0 <= beta1 < beta2 < 1")
        return self


class Train(Section):
    seed: Seed
    epochs: Count | None
    steps: Count | None
    batch_size: Count
    workers: Annotated[int, Field(ge=0, le=256)]
    warmup_steps: Annotated[int, Field(ge=0)]
    grad_clip: Annotated[float, Field(gt=0)] | None
    ema_decay: Probability
    flip: bool
    transforms: list[dict[str, Any]]
    precision: Literal["fp32", "bf16"]
    log_every: Count
    sample_every: Annotated[int, Field(ge=0)]
    save_every: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("set exactly one of epochs and steps, and the other to null")
        return self


class Sample(Section):
    seed: Seed
    count: Annotated[int, Field(ge=2)]
    batch_size: Count
    sampler: Literal["ddpm", "ddim"]
    steps: Count
    spacing: Literal["leading", "trailing", "linear", "quadratic"]
    eta: Annotated[float, Field(ge=0, le=1)]
    variance: Literal["fixed_small", "fixed_large"]
    grid: Count


class Evaluate(Section):
    seed: Seed
    features: Literal["pixels", "inception"]
    inception_weights: str | None
    reference: Literal["train", "test", "all"]
    neighbours: Count
    kid_subset_size: Annotated[int, Field(ge=2)]
    batch_size: Count
    loss_bins: Count


class Tracking(Section):
    wandb: Literal["auto", "online", "offline", "disabled"]
    project: Annotated[str, Field(min_length=1, pattern=r"^[\w.-]+$")]


class Params(Section):
    """All of `params.yaml`, one section a field."""

    runtime: Runtime
    dataset: Dataset
    model: Model
    diffusion: Diffusion
    optimizer: Optimizer
    lr_schedule: Instance | None
    train: Train
    sample: Sample
    evaluate: Evaluate
    tracking: Tracking

    @field_validator("optimizer", "lr_schedule", mode="after")
    @classmethod
    def _known(cls, value: Instance | None) -> Instance | None:
        if value is not None:
            _check_target(value.model_dump(by_alias=True), OPTIMIZER if isinstance(value, Optimizer) else LR_SCHEDULER)
        return value

    @field_validator("train", mode="after")
    @classmethod
    def _known_transforms(cls, value: Train) -> Train:
        for transform in value.transforms:
            _check_target(transform, TRANSFORM)
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_target(node: dict[str, Any], kind: Kind) -> None:
    fault = target_fault(node, kind)
    if fault:
        raise ValueError(fault)


def _misfits(params: Params) -> list[str]:
    """Faults that lie between sections: each value is allowed, their combination is not."""
    faults = []
    model, size = params.model, params.dataset.image_size
    stride = 2 ** (len(model.channel_multipliers) - 1)
    if size % stride:
        faults.append(
            f"dataset.image_size = {size}: must be a multiple of {stride}, since model.channel_multipliers has "
            f"{len(model.channel_multipliers)} levels and each but the last halves the image"
        )
    for multiplier in model.channel_multipliers:
        if model.base_channels * multiplier % model.norm_groups:
            faults.append(
                f"model.norm_groups = {model.norm_groups}: must divide every level's channels, and "
                f"{model.base_channels} x {multiplier} = {model.base_channels * multiplier} is no multiple of it"
            )
            break
    resolutions = [size >> level for level in range(len(model.channel_multipliers))]
    for resolution in model.attention_resolutions:
        if resolution not in resolutions and not size % stride:
            faults.append(
                f"model.attention_resolutions = {resolution}: no level has this size; the levels are {resolutions}"
            )
    if params.sample.steps > params.diffusion.timesteps:
        faults.append(
            f"sample.steps = {params.sample.steps}: must be at most diffusion.timesteps = {params.diffusion.timesteps}"
        )
    if params.evaluate.neighbours >= params.sample.count:
        faults.append(
            f"evaluate.neighbours = {params.evaluate.neighbours}: must be below sample.count = {params.sample.count}"
        )
    return faults


def _field_names(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed where an unknown one was found."""
    model: Any = Params
    for part in loc[:-1]:
        model = model.model_fields[str(part)].annotation
    return list(model.model_fields)


def _line(error: Any) -> str:
    loc = tuple(part for part in error["loc"] if not (isinstance(part, str) and part[:1].isupper()))
    path = ".".join(map(str, loc)) or "(file)"
    if error["type"] == "extra_forbidden":
        names = _field_names(loc)
        close = difflib.get_close_matches(str(loc[-1]), names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{path} = {error['input']!r}: unknown key{hint}; allowed: {', '.join(names)}"
    if error["type"] == "missing":
        return f"{path}: missing; add it, or compose the file again from conf/ (make params)"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict | BaseModel):
        return f"{path}: {message}"
    return f"{path} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def check(tree: Any, source: str = "params.yaml") -> Params:
    """Validate a plain tree of parameters.

    Raises:
        UserError: one line a fault, each with the path of the setting, its value and what is allowed.
    """
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        lines = list(dict.fromkeys(_line(fault) for fault in error.errors()))
    else:
        lines = _misfits(params)
        if not lines:
            return params
    raise UserError("\n".join(f"{source}: {line}" for line in lines))


def load_params(sections: tuple[str, ...], path: str | Path = "params.yaml") -> Any:
    """Read and check all of `path`; return an object that has the named sections and no others.

    The whole file is checked in every stage, so that a misspelt evaluation setting stops the run before
    the training and not after it. Read with OmegaConf, since PyYAML takes `1e-4` for a string.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run this in the repository's root") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not readable as YAML: {' '.join(str(error).split())}") from None
    params = check(tree, str(path))
    return SimpleNamespace(**{name: getattr(params, name) for name in sections})
