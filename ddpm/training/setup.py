"""Build what a training starts from: network, weights, optimizer, learning-rate schedule and kernels."""

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from ddpm.config.checks import steps_per_epoch
from ddpm.config.schema import Model, Params, TargetNode, Train
from ddpm.config.targets import LR_SCHEDULER, OPTIMIZER, build
from ddpm.core.diffusion import DiffusionConfig, GaussianDiffusion
from ddpm.core.noise_levels import Timesteps, timestep_shares
from ddpm.core.seeding import derive
from ddpm.core.unet import UNet, UNetConfig, initialise
from ddpm.errors import UserError
from ddpm.model_folder import load_weights
from ddpm.runtime import processes
from ddpm.runtime.device import Kernels, choose_kernels
from ddpm.training import muon  # noqa: F401  loaded by its name; imported here so that DVC watches it

LENGTHS = ("T_max", "total_iters", "total_steps")  # torch's schedulers name their length, in steps, so


@dataclass(frozen=True)
class Setup:
    """A training before its first step.

    Attributes:
        model: on the device, in training mode, with its initial weights.
        network: the module to call: the model, or its compiled or DDP wrapper.
        scaler: of the loss in fp16, whose smallest gradients would vanish; disabled in other precisions.
        timesteps: draws the timesteps of training images.
        total: optimizer steps of the whole training.
        per_epoch: optimizer steps per epoch.
    """

    model: UNet
    network: nn.Module
    diffusion: GaussianDiffusion
    timesteps: Timesteps
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    schedule: LRScheduler
    kernels: Kernels
    device: torch.device
    total: int
    per_epoch: int


class Design(NamedTuple):
    """What is trained: the shape of the network, its diffusion, and the names of its classes."""

    network: UNetConfig
    diffusion: DiffusionConfig
    classes: tuple[str, ...]


def design(params: Params, info: Mapping[str, Any]) -> Design:
    """The network, diffusion and classes that the parameters ask for, for the prepared data.

    Args:
        info: the content of dataset.json.

    Raises:
        UserError: the network is class-conditional, and the data has no classes.
    """
    (size, _, channels), names = info["shape"], info["classes"]
    diffusion = DiffusionConfig(**params.diffusion.model_dump())
    unlabelled = params.train.hidden_labels > 0
    network = unet_config(params.model, size, channels, diffusion.learn_variance, len(names), unlabelled)
    return Design(network, diffusion, tuple(names) if params.model.class_conditional else ())


def set_up(params: Params, design: Design, device: torch.device, images: int) -> Setup:
    """Build all that a training changes or computes with.

    Args:
        params: only the sections runtime, optimizer, lr_schedule and train are read.
        images: number of training images.

    Raises:
        UserError: there are no images, the batch does not divide among the processes, train.init_from does not fit, or
            a setting is refused.
    """
    p = params.train
    _check_batch(p, images)
    per_epoch = steps_per_epoch(images, p.batch_size)
    total = p.steps if p.steps is not None else per_epoch * (p.epochs or 0)
    model = UNet(design.network)
    if p.init_from is None:
        initialise(model, torch.Generator().manual_seed(derive(p.seed, "init")))
    else:
        model.load_state_dict(load_weights(p.init_from, design.network, design.diffusion.prediction, design.classes))
    kernels = choose_kernels(p, params.runtime, device, total)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {images:,} images", flush=True)
    model.to(device).to(memory_format=kernels.memory_format).train()
    model.set_recompute(p.activation_checkpointing)
    optimizer = make_optimizer(params.optimizer, model)
    diffusion = GaussianDiffusion(design.diffusion, device)
    shares = timestep_shares(diffusion.alphas_cumprod, p.noise_levels, p.noise_levels_width or 1.0)
    return Setup(
        model=model,
        network=_wrapped(model, kernels),
        diffusion=diffusion,
        timesteps=Timesteps(shares, device),
        optimizer=optimizer,
        scaler=_scaler(optimizer, kernels, device),
        schedule=make_lr_schedule(params.lr_schedule, optimizer, p.warmup_steps, total),
        kernels=kernels,
        device=device,
        total=total,
        per_epoch=per_epoch,
    )


def unet_config(
    model: Model, image_size: int, channels: int, learn_variance: bool, classes: int, unlabelled: bool
) -> UNetConfig:
    """The network that the parameters' `model` section describes, for images of this size (pixels).

    Args:
        learn_variance: whether the network has twice the output channels, for the variances.
        classes: number of classes of the data; only a class-conditional network uses it.
        unlabelled: whether a class-conditional network also learns images without their labels.

    Raises:
        UserError: the network is class-conditional, and the data has no classes.
    """
    if model.class_conditional and not classes:
        raise UserError(
            "params.yaml: model.class_conditional = true: the prepared data has no classes; put the images of each "
            "class into a sub-folder of dataset.path, or set it to false"
        )
    return UNetConfig(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels * (2 if learn_variance else 1),
        block_out_channels=tuple(model.base_channels * multiplier for multiplier in model.channel_multipliers),
        layers_per_block=model.blocks_per_level,
        attention=tuple(model.attention),
        dropout=model.dropout,
        norm_num_groups=model.norm_groups,
        num_class_embeds=classes + unlabelled if model.class_conditional else None,
        has_no_label=model.class_conditional and unlabelled,
    )


def make_optimizer(node: TargetNode, model: nn.Module) -> Optimizer:
    """The optimizer that `node` names, over all weights of the model.

    Raises:
        UserError: the optimizer refuses its arguments.
    """
    try:
        optimizer: Optimizer = build(node.model_dump(by_alias=True), OPTIMIZER, model.named_parameters())
    except ValueError as error:
        raise UserError(f"params.yaml: optimizer: {error}") from None
    return optimizer


def make_lr_schedule(node: TargetNode | None, optimizer: Optimizer, warmup: int, steps: int) -> LRScheduler:
    """Linear warm-up over `warmup` steps, then the scheduler that `node` names; without one the rate stays at its peak.

    Where the scheduler takes its length (T_max, total_iters or total_steps) and `node` leaves it out, its length is
    the number of steps after the warm-up. `steps`: of the whole training.

    Raises:
        UserError: the scheduler refuses its arguments.
    """
    arguments: dict[str, Any] = {"_target_": "torch.optim.lr_scheduler.ConstantLR", "factor": 1.0}
    if node is not None:
        arguments = node.model_dump(by_alias=True)
    name = arguments["_target_"].rpartition(".")[2]
    accepted = inspect.signature(getattr(torch.optim.lr_scheduler, name)).parameters
    for length in LENGTHS:
        if length in accepted and length not in arguments:
            arguments[length] = max(1, steps - warmup)
    try:
        after: LRScheduler = build(arguments, LR_SCHEDULER, optimizer)
    except ValueError as error:
        raise UserError(f"params.yaml: lr_schedule: {error}") from None
    if not warmup:
        return after
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, after], milestones=[warmup])


def _check_batch(train: Train, images: int) -> None:
    """Refuse a batch that cannot be trained on; print a line where a step repeats images."""
    if not images:
        raise UserError("there are no training images; run the stage prepare_data again")
    if train.batch_size % (processes.size() * train.accumulation):
        raise UserError(
            f"params.yaml: train.batch_size = {train.batch_size}: must be a multiple of {processes.size()} processes x "
            f"train.accumulation = {train.accumulation}"
        )
    if train.batch_size > images:
        print(f"train.batch_size = {train.batch_size}: more than the {images} images, so each step repeats some")


def _scaler(optimizer: Optimizer, kernels: Kernels, device: torch.device) -> torch.amp.GradScaler:
    """The scaler of the loss (Micikevicius et al. 2018, arXiv 1710.03740), which skips steps that overflow.

    Gradients are averaged over the processes before the scaler looks at them, so all processes have the same scale.
    """
    if kernels.precision == "fp16":
        # torch warns if the optimizer's first step is skipped; the schedule counts that step on purpose
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before")
        if isinstance(optimizer, torch.optim.SGD):
            # its fused kernel would allocate the momentum in a skipped first step and leave it uninitialised
            optimizer._step_supports_amp_scaling = False
    return torch.amp.GradScaler(device.type, enabled=kernels.precision == "fp16")


def _wrapped(model: UNet, kernels: Kernels) -> nn.Module:
    """The module to call: gradients are averaged over the processes, and the kernels compiled where that is chosen."""
    network: nn.Module = model
    if processes.size() > 1:
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if kernels.compile:
        network = torch.compile(network)  # type: ignore[assignment]
    return network
