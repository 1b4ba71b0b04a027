"""The sections of `params.yaml` and the bounds of every setting; ddpm/config/load.py reads the file into them.

A field has a default only where some choices of its group cannot use it: see USED_BY in ddpm/config/load.py.
Imports neither torch nor NumPy, like all of ddpm/config: a wrong value must stop a stage within two seconds, and the
environment that makes results reproducible must be set before either is loaded.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


def _auto_or_bool(value: Any) -> Any:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError("should be auto, true or false")


Width = Annotated[float, Field(ge=0, le=0.28)]  # of an average of the weights; see ddpm/core/ema.py
AutoBool = Annotated[Literal["auto"] | bool, BeforeValidator(_auto_or_bool)]


class Section(BaseModel):
    """Unknown keys are refused and nothing is converted: neither `"3"` nor `3.0` is an integer."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Runtime(Section):
    """What to compute on, and whether other machines must produce the same bytes."""

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


class Dataset(Section):
    """The images, and how many of them."""

    name: Literal["digits", "cifar10", "mnist", "fashion_mnist", "folder"]
    path: Annotated[str, Field(min_length=1)]
    image_size: Annotated[int, Field(ge=4, le=1024)]
    channels: Literal[1, 3]
    subset: int | float | None
    test_fraction: Fraction = 0.1
    on_broken: Literal["stop", "skip"] = "stop"
    max_megapixels: Annotated[float, Field(gt=0, le=100_000)] = 179

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
    beta_start: Fraction = 1e-4
    beta_end: Fraction = 0.02
    prediction: Literal["epsilon", "x0", "v"]
    learn_variance: bool

    @field_validator("beta_end")
    @classmethod
    def _betas_rise(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("beta_start", 0) >= value:
            raise ValueError(f"should be above diffusion.beta_start = {info.data['beta_start']}")
        return value


class TargetNode(BaseModel):
    """An object named by `_target_`, with its own arguments beside it (see `_target_lines`)."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)
    target: str = Field(alias="_target_")


class Optimizer(TargetNode):
    """An optimizer of torch, or Muon; `lr` is the peak learning rate."""

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
    ema_widths: Annotated[list[Width], Field(min_length=1, max_length=8)]
    flip: bool
    transforms: list[dict[str, Any]]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    channels_last: AutoBool
    compile: AutoBool
    activation_checkpointing: bool
    noise_levels: Literal["uniform", "normal", "laplace"]
    noise_levels_width: Annotated[float, Field(ge=0.1, le=100)] | None
    stratified: bool
    noise_coupling: Literal["independent", "assigned"]
    weighting: Literal["simple", "min_snr"]
    label_dropout: Literal["auto"] | float
    log_every_steps: Count
    held_out_every_epochs: Count
    keep: Literal["last", "best"]
    preview_every_epochs: Annotated[int, Field(ge=0)]
    save_every_seconds: Annotated[float, Field(gt=0)]

    @field_validator("label_dropout", mode="before")
    @classmethod
    def _auto_or_share(cls, value: Any) -> Any:
        if value == "auto" or (type(value) in (int, float) and 0 <= value < 1):
            return value if value == "auto" else float(value)
        raise ValueError("should be auto, or a number from 0 up and below 1")

    @property
    def hidden_labels(self) -> float:
        """The share of the images that a class-conditional network is trained on without their labels."""
        return 0.1 if self.label_dropout == "auto" else self.label_dropout

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
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    variance: Literal["fixed_small", "fixed_large", "learned"]
    classes: Annotated[list[str | int], Field(min_length=1)] | None
    class_frequencies: Literal["equal", "data"]
    guidance: Annotated[float, Field(ge=0, le=1000)]
    ema_width: Width | None
    grid: Count


def _extractor(value: str) -> str:
    if value in ("pixels", "inception") or re.fullmatch(r"timm:\w+(\.[\w.-]+)?", value):
        return value
    raise ValueError("should be pixels, inception, or timm:<name> of a model of the library timm")


class NfeCurve(Section):
    """One line of the Fréchet distance against the network evaluations: a sampler at several numbers of steps."""

    sampler: Literal["ddpm", "ddim", "dpm_solver"]
    steps: Annotated[list[Count], Field(min_length=1)]


class Evaluate(Section):
    """How samples are compared with real images; see ddpm/evaluation/evaluate.py."""

    seed: Seed
    seeds: Annotated[int, Field(ge=1, le=100)]
    ema_widths: list[Width]
    features: Annotated[str, AfterValidator(_extractor)]
    weights: Annotated[str, Field(min_length=1)] | None = None
    input_size: Annotated[int, Field(ge=8, le=2048)] | None = None
    reference: Literal["train", "test", "all"]
    reference_images: Annotated[int, Field(ge=2, lt=2**31)] | None
    neighbours: Count
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
    """All of `params.yaml`, one field per section."""

    runtime: Runtime
    dataset: Dataset
    model: Model
    diffusion: Diffusion
    optimizer: Optimizer
    lr_schedule: TargetNode | None
    train: Train
    sample: Sample
    evaluate: Evaluate
    tracking: Tracking
