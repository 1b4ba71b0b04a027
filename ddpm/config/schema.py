"""The parameters: one typed schema for `params.yaml`, checked before anything else is done.

This module imports neither torch nor numpy: a wrong value has to stop a stage within two seconds, and the
environment that makes results reproducible has to be set before either is loaded.
"""

from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from ddpm.config.checks import setting_faults
from ddpm.config.targets import LR_SCHEDULER, OPTIMIZER, TRANSFORM, near, shown, target_faults
from ddpm.core.schedules import schedule_faults
from ddpm.errors import UserError

Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


def _choice(value: Any) -> Any:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError("should be auto, true or false")


Choice = Annotated[Literal["auto"] | bool, BeforeValidator(_choice)]


class Section(BaseModel):
    """Unknown keys are refused and nothing is converted: `"3"` is no integer, `3.0` neither."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Runtime(Section):
    """What to compute on, and whether the bytes have to be the same elsewhere."""

    device: Literal["auto", "cpu", "cuda"]
    reproducible: bool
    threads: Annotated[int, Field(ge=1, le=1024)] | None
    launcher: Literal["none", "torchrun"]
    processes: Annotated[int, Field(ge=1, le=1024)] | None

    @field_validator("threads")
    @classmethod
    def _threads_are_fixed(cls, value: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("reproducible") and value is None:
            raise ValueError("should be a number where runtime.reproducible is true, since the bytes depend on it")
        return value


# Settings of `dataset` that not every set can use, with the sets that can
PARTLY_USED = {"test_fraction": ("digits", "folder"), "on_broken": ("folder",)}
MISSING = "missing; add it, or compose the file again from conf/ (make params)"
WATCHED = "requirements.txt"  # dataset.path of every set but folder: what DVC watches


class Dataset(Section):
    """The images, and how many of them."""

    name: Literal["digits", "cifar10", "mnist", "fashion_mnist", "folder"]
    path: Annotated[str, Field(min_length=1)]
    image_size: Annotated[int, Field(ge=4, le=1024)]
    channels: Literal[1, 3]
    subset: int | float | None
    test_fraction: Fraction = 0.1
    on_broken: Literal["stop", "skip"] = "stop"
    max_megapixels: Annotated[float, Field(gt=0, le=100_000)] = 179  # of a folder's files; the other sets are small

    @field_validator("channels", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        if type(value) is not int:  # Literal would take True and 1.0 for 1
            raise ValueError("should be 1 or 3")
        return value

    @field_validator("subset", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        if value is None or (type(value) is int and 1 <= value < 2**31) or (type(value) is float and 0 < value < 1):
            return value
        raise ValueError("should be null, a count from 1 up, or a fraction between 0 and 1")


class Model(Section):
    """The network; see ddpm/core/unet.py."""

    base_channels: Count
    channel_multipliers: Annotated[list[Count], Field(min_length=1, max_length=8)]
    blocks_per_level: Count
    attention: list[bool]
    dropout: Probability
    norm_groups: Count
    class_conditional: bool


class Diffusion(Section):
    """The noise schedule and what the network predicts; see ddpm/core/diffusion.py."""

    timesteps: Annotated[int, Field(ge=2, le=100_000)]
    schedule: Literal["linear", "cosine", "sigmoid"]
    beta_start: Fraction
    beta_end: Fraction
    prediction: Literal["epsilon", "x0", "v"]
    learn_variance: bool

    @field_validator("beta_end")
    @classmethod
    def _betas_rise(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("beta_start", 0) >= value:
            raise ValueError(f"should be above diffusion.beta_start = {info.data['beta_start']}")
        return value


class Instance(BaseModel):
    """An object named by `_target_`, with its own arguments beside it (see `_target_lines`)."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)
    target: str = Field(alias="_target_")


class Optimizer(Instance):
    """An optimizer of torch; its learning rate is the peak."""

    lr: Annotated[float, Field(gt=0)]


class Train(Section):
    """The training loop; see ddpm/training/loop.py."""

    seed: Seed
    init_from: Annotated[str, Field(min_length=1)] | None
    epochs: Count | None
    steps: Count | None
    batch_size: Count
    accumulation: Count
    workers: Annotated[int, Field(ge=0, le=256)]
    warmup_steps: Annotated[int, Field(ge=0)]
    grad_clip: Annotated[float, Field(gt=0)] | None
    ema_decay: Probability
    flip: bool
    transforms: list[dict[str, Any]]
    precision: Literal["auto", "fp32", "bf16"]
    channels_last: Choice
    compile: Choice
    activation_checkpointing: bool
    weighting: Literal["simple", "min_snr"]
    label_dropout: Probability
    log_every: Count
    sample_every: Annotated[int, Field(ge=0)]
    save_every: Annotated[float, Field(gt=0)]

    @field_validator("steps")
    @classmethod
    def _one_length(cls, value: int | None, info: ValidationInfo) -> int | None:
        if "epochs" in info.data and (info.data["epochs"] is None) == (value is None):
            raise ValueError(
                f"set exactly one of train.epochs (now {info.data['epochs']}) and train.steps, the other to null"
            )
        return value


class Sample(Section):
    """How samples are drawn; see ddpm/core/samplers.py."""

    seed: Seed
    count: Annotated[int, Field(ge=2)]
    batch_size: Count
    sampler: Literal["ddpm", "ddim", "dpm_solver"]
    steps: Count
    spacing: Literal["leading", "trailing", "linear", "quadratic"]
    eta: Annotated[float, Field(ge=0, le=1)]
    variance: Literal["fixed_small", "fixed_large", "learned"]
    classes: Annotated[list[str | int], Field(min_length=1)] | None
    class_frequencies: Literal["equal", "data"]
    guidance: Annotated[float, Field(ge=0, le=1000)]
    grid: Count


class NfeCurve(Section):
    """One line of the Fréchet distance against the network evaluations: a sampler at several numbers of steps."""

    sampler: Literal["ddpm", "ddim", "dpm_solver"]
    steps: Annotated[list[Count], Field(min_length=1)]


class Evaluate(Section):
    """How samples are compared with real images; see ddpm/evaluation/evaluate.py."""

    seed: Seed
    seeds: Annotated[int, Field(ge=1, le=100)]
    features: Literal["pixels", "inception"]
    inception_weights: str | None
    reference: Literal["train", "test", "all"]
    neighbours: Count
    kid_subset_size: Annotated[int, Field(ge=2)]
    batch_size: Count
    loss_bins: Count
    loss_images: Count | None
    bound_images: Annotated[int, Field(ge=0)]
    nfe_curve: list[NfeCurve]
    nfe_samples: Annotated[int, Field(ge=2, lt=2**31)]


class Tracking(Section):
    """Where the run is recorded beside its files; see ddpm/runtime/tracking.py."""

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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _target_lines(tree: Any) -> Iterator[str]:
    """Faults of what `_target_` names and of its arguments, which are torch's and so not in the schema.

    Looked for in the plain tree, so that they are told together with the schema's own.
    """
    sections = {name: value for name, value in tree.items() if isinstance(value, dict)}
    for name, kind in (("optimizer", OPTIMIZER), ("lr_schedule", LR_SCHEDULER)):
        if isinstance(sections.get(name, {}).get("_target_"), str):  # else the schema tells it
            yield from target_faults(sections[name], kind, name)
    transforms = sections.get("train", {}).get("transforms")
    for i, node in enumerate(transforms if isinstance(transforms, list) else []):
        if isinstance(node, dict):
            yield from target_faults(node, TRANSFORM, f"train.transforms.{i}")
    yield from _optimizer_lines(sections.get("optimizer", {}))


def _optimizer_lines(node: dict[str, Any]) -> Iterator[str]:
    """Bounds of the arguments that most optimizers have; torch checks some of them, and only once data is read."""
    bounds = {"momentum": (1, "below 1"), "weight_decay": (1000, "below 1000"), "eps": (1000, "below 1000")}
    if str(node.get("_target_")).endswith(".Adafactor"):
        del bounds["eps"]  # a pair
    for name, (high, text) in bounds.items():
        value = node.get(name)
        if value is not None and not (_is_number(value) and 0 <= value < high):
            yield f"optimizer.{name} = {shown(value)}: should be a number from 0 up and {text}"
    betas = node.get("betas")
    pair = isinstance(betas, list) and len(betas) == 2 and all(map(_is_number, betas))
    if betas is not None and not (pair and 0 <= betas[0] < betas[1] < 1):
        yield f"optimizer.betas = {shown(betas)}: should be two numbers with 0 <= beta1 < beta2 < 1"


def _dataset_misfits(dataset: Dataset) -> Iterator[str]:
    """Settings that the named set lacks or cannot use."""
    kind = f"where dataset.name = {dataset.name!r}"
    for name, users in PARTLY_USED.items():
        given, used = name in dataset.model_fields_set, dataset.name in users
        if used and not given:
            yield f"dataset.{name}: {MISSING}"
        if given and not used:
            yield f"dataset.{name} = {shown(getattr(dataset, name))}: has no effect {kind}; remove it"
    if dataset.name != "folder" and dataset.path != WATCHED:
        yield (
            f"dataset.path = {shown(dataset.path)}: is not read {kind}; add -S dataset=folder to take the images "
            f"there, or set it to {WATCHED}"
        )
    if dataset.name == "folder" and dataset.path.startswith("~"):
        yield (
            f"dataset.path = {shown(dataset.path)}: ~ is not replaced by the home folder here; type the full path "
            f"that this prints: echo {shown(dataset.path)[1:-1]}"
        )


def _misfits(params: Params) -> list[str]:
    """Faults that lie between settings: each value is allowed, their combination is not."""
    faults = list(_dataset_misfits(params.dataset))
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
    if len(model.attention) != len(model.channel_multipliers):
        faults.append(
            f"model.attention = {shown(model.attention)}: must have one true or false for each of the "
            f"{len(model.channel_multipliers)} levels of model.channel_multipliers"
        )
    if params.runtime.launcher == "none" and params.runtime.processes is not None:
        faults.append(f"runtime.processes = {params.runtime.processes}: needs runtime.launcher = 'torchrun'")
    schedule = params.diffusion.model_dump(include={"timesteps", "schedule", "beta_start", "beta_end"})
    faults += [f"diffusion.{name} = {schedule[name]}: {message}" for name, message in schedule_faults(**schedule)]
    if params.sample.steps > params.diffusion.timesteps:
        faults.append(
            f"sample.steps = {params.sample.steps}: must be at most diffusion.timesteps = {params.diffusion.timesteps}"
        )
    if params.sample.variance == "learned" and not params.diffusion.learn_variance:
        faults.append("sample.variance = 'learned': needs diffusion.learn_variance = true")
    sample = params.sample
    if not model.class_conditional and sample.classes is not None:
        faults.append(f"sample.classes = {shown(sample.classes)}: needs model.class_conditional = true")
    if not model.class_conditional and sample.class_frequencies != "equal":
        faults.append(f"sample.class_frequencies = {sample.class_frequencies!r}: needs model.class_conditional = true")
    if not model.class_conditional and sample.guidance != 1:
        faults.append(f"sample.guidance = {sample.guidance:g}: needs model.class_conditional = true; 1 is no guidance")
    if model.class_conditional and sample.guidance != 1 and params.train.label_dropout == 0:
        faults.append(
            f"sample.guidance = {sample.guidance:g}: needs train.label_dropout above 0, so that the network "
            f"also learns to do without a label; 1 is no guidance"
        )
    for i, curve in enumerate(params.evaluate.nfe_curve):
        if max(curve.steps) > params.diffusion.timesteps:
            faults.append(
                f"evaluate.nfe_curve.{i}.steps = {shown(curve.steps)}: must each be at most diffusion.timesteps = "
                f"{params.diffusion.timesteps}"
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
        # an integer is a place in a list of sections
        model = get_args(model)[0] if isinstance(part, int) else model.model_fields[part].annotation
    return list(model.model_fields)


def _line(error: Any) -> str:
    loc = error["loc"]
    path = ".".join(map(str, loc))
    if error["type"] == "missing":
        return f"{path}: {MISSING}"
    if error["type"] == "extra_forbidden":
        names = _field_names(loc)
        message = f"unknown key{near(str(loc[-1]), names)}; allowed: {', '.join(names)}"
    elif error["type"] == "model_type":
        message = "should be a section, with its settings indented below it"
    else:
        message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{path} = {shown(error['input'])}: {message[0].lower()}{message[1:]}"


def check(tree: Any, source: str = "params.yaml") -> Params:
    """Validate a plain tree of parameters.

    Raises:
        UserError: one line a fault, each with the path of the setting, its value and what is allowed.
    """
    if not isinstance(tree, dict) or not tree.keys() & Params.model_fields.keys():
        raise UserError(f"{source}: holds no section of parameters; compose it again from conf/ (make params)")
    lines = list(_target_lines(tree))
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        lines = [_line(fault) for fault in error.errors()] + lines
    else:
        lines = lines or _misfits(params) + setting_faults(params)
        if not lines:
            return params
    told: dict[str, str] = {}  # the first fault of each setting
    for line in lines:
        told.setdefault(line.partition(" = ")[0], line)
    # a key may hold a line break or a terminal's control characters
    printable = (line if line.isprintable() else line.encode("unicode_escape").decode() for line in told.values())
    raise UserError("\n".join(f"{source}: {line}" for line in printable))


def load_all(path: str | Path = "params.yaml") -> Params:
    """Read and check all of `path`, with OmegaConf, since PyYAML takes `1e-4` for a string.

    Raises:
        UserError: it is missing, unreadable or has faults, one line each.
    """
    OmegaConf.clear_resolver("oc.env")  # a stranger's parameters must not carry this machine's secrets into records
    try:
        text = Path(path).read_text(encoding="utf-8")
        for token in yaml.scan(text):
            if isinstance(token, yaml.AliasToken):  # a few of them may stand for more than memory holds
                raise ValueError(
                    f"line {token.start_mark.line + 1}: write out what the alias *{token.value} stands for"
                )
        tree = OmegaConf.to_container(OmegaConf.load(StringIO(text)), resolve=True, throw_on_missing=True)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run this in the repository's root") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not readable as YAML: {reason[:300]}") from None
    return check(tree, str(path))


def load_params(sections: tuple[str, ...], path: str | Path = "params.yaml") -> Any:
    """Read and check all of `path`; return an object that has the named sections and no others.

    The whole file is checked in every stage, so that a misspelt evaluation setting stops the run before
    the training and not after it.
    """
    params = load_all(path)
    return SimpleNamespace(**{name: getattr(params, name) for name in sections})
