"""From noise to images. Every sampler has one signature and yields the state after each network evaluation."""

import hashlib
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm.config.schema import Sample
from ddpm.core.diffusion import GaussianDiffusion, Variance
from ddpm.core.pixels import to_pixels
from ddpm.core.seeding import generator
from ddpm.core.unet import UNet, UNetConfig
from ddpm.errors import UserError
from ddpm.runtime.progress import Progress
from ddpm.runtime.resume import Keep, not_kept, slices

Spacing = Literal["leading", "trailing", "linear", "quadratic"]
Model = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, H, W) and t (B,) to the network's output


class Step(NamedTuple):
    """The timestep that was left, the state x_{t-1} after it, and the clipped prediction of x_0 made there."""

    t: int
    x: Tensor
    x0: Tensor


def timesteps(total: int, steps: int, spacing: Spacing) -> list[int]:
    """The timesteps that a sampler visits, from noisy to clean: `steps` distinct integers in [0, total).

    leading, trailing and linear as in Lin et al. 2023, table 2; quadratic as in Song et al. 2021, appendix D.2, where
    neighbours that rounding makes coincide at small t are moved up to the next free timestep.

    Raises:
        UserError: steps is not in 1 ... total.
    """
    if not 1 <= steps <= total:
        raise UserError(f"params.yaml: sample.steps = {steps}: must be from 1 to {total}, the timesteps of the model")
    chosen: np.ndarray
    if spacing == "leading":
        chosen = np.arange(steps) * (total // steps)
    elif spacing == "trailing":
        chosen = np.round(np.arange(total, 0, -total / steps))[:steps] - 1  # rounding may append a timestep -1
    elif spacing == "linear":
        chosen = np.round(np.linspace(0, total - 1, steps))
    else:
        order = np.arange(steps)
        floor = (np.linspace(0, math.sqrt(total * 0.8), steps) ** 2).astype(np.int64)
        chosen = np.maximum.accumulate(floor - order) + order  # the least distinct integers from `floor` up
    return sorted(map(int, chosen), reverse=True)


def guided(model: UNet, labels: Tensor, scale: float) -> Model:
    """A class-conditional network as a sampler wants it, with classifier-free guidance (Ho & Salimans 2022, eq. 6).

    The prediction is unconditional + scale * (conditional - unconditional), scale being their 1 + w: at 1 there is
    no guidance, and one evaluation a step instead of two. The same combination holds for epsilon, x0 and v, which are
    affine in each other. A learned variance stays that of the conditional output.

    Args:
        labels: the class of each image, int64 (B,).
    """
    if scale == 1:
        return partial(model, labels=labels)
    both = torch.cat([labels, torch.full_like(labels, model.config.no_label)])  # type: ignore[arg-type]

    def predict(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = model(x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        channels = x.shape[1]
        change = (scale - 1) * (conditional - unconditional)[:, :channels]
        return torch.cat([conditional[:, :channels] + change, conditional[:, channels:]], dim=1)

    return predict


def chosen_classes(params: Sample, config: UNetConfig) -> list[int]:
    """The classes to draw, in turn: all of the network's, or those of `sample.classes`; empty if unconditional.

    Raises:
        UserError: a class or guidance that the network does not have.
    """
    names = list(config.class_names) or [str(i) for i in range(config.classes)]
    if params.guidance != 1 and config.no_label is None:
        raise UserError(
            f"params.yaml: sample.guidance = {params.guidance:g}: must be 1 (no guidance), since models/ddpm has not "
            f"learnt to do without a label"
        )
    wanted = names if params.classes is None else [str(name) for name in params.classes]
    for name in wanted:
        if name not in names:
            allowed = f"known: {', '.join(names[:50])}" if names else "models/ddpm is unconditional; set it to null"
            raise UserError(f"params.yaml: sample.classes: {name!r} is no class of models/ddpm; {allowed}")
    return [names.index(name) for name in wanted]


def class_sequence(params: Sample, config: UNetConfig, class_counts: Sequence[int], count: int) -> list[int]:
    """The classes of samples 0 ... count-1; empty if the network is unconditional. A prefix of a longer sequence.

    equal: each class in turn. data: as often as the training data has them, by Sainte-Laguë's rule: sample i is of
    the class with the largest c / (2 n + 1), where c is the number of its training images and n that of its samples
    before i. The first k samples are then the best rounding of the data's frequencies to k samples, for every k.

    Args:
        class_counts: training images of each class of the network; used for `data` only.

    Raises:
        UserError: as for `chosen_classes`; or the numbers of images are not known, or are all 0.
    """
    classes = chosen_classes(params, config)
    if params.class_frequencies == "equal":
        return [classes[i % len(classes)] for i in range(count)] if classes else []
    setting = "params.yaml: sample.class_frequencies = data"
    if not classes:
        raise UserError(f"{setting}: models/ddpm is unconditional; set it to equal")
    if len(class_counts) != config.classes:
        raise UserError(
            f"{setting}: models/ddpm/training.json does not hold the class_counts of its {config.classes} classes; set "
            f"it to equal, or train here"
        )
    queue = [(Fraction(1, class_counts[c]), c) for c in dict.fromkeys(classes) if class_counts[c]]
    if not queue:
        raise UserError(f"{setting}: the data has no image of sample.classes = {params.classes}; set it to equal")
    heapq.heapify(queue)
    drawn = []
    for _ in range(count):
        price, chosen = queue[0]  # (2 n + 1) / c
        drawn.append(chosen)
        heapq.heapreplace(queue, (price + Fraction(2, class_counts[chosen]), chosen))
    return drawn


def check_variance(params: Sample, diffusion: GaussianDiffusion) -> None:
    """Compare `sample.variance` with what the network has learned, and print a note where that is not used.

    Raises:
        UserError: the network has learned no variance.
    """
    learned = diffusion.config.learn_variance
    if params.variance == "learned" and not learned:
        raise UserError(
            "params.yaml: sample.variance = learned: models/ddpm has learned no variance; set it to fixed_small"
        )
    if params.variance != "learned" and learned:
        print(
            f"note: models/ddpm has learned its variance, and sample.variance = {params.variance} does not use it, "
            f"neither to draw (ddpm) nor for bits/dim; set sample.variance=learned to use it",
            flush=True,
        )


def normal(
    generators: Sequence[np.random.Generator], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """One standard normal draw of `shape` from each generator: float32 (B, *shape)."""
    draws = [g.standard_normal(shape, dtype=np.float32) for g in generators]
    return torch.from_numpy(np.stack(draws)).to(device)


class ImageNoise:
    """The standard normal draws of a batch of samples: each call gives the next, float32 (B, C, H, W).

    Sample i draws from (seed, i) alone: first its start noise, then the noise of each step of its path. So
    an image does not depend on the others, on the batch size, or on the device.
    """

    def __init__(self, seed: int, indices: range, config: UNetConfig, device: torch.device) -> None:
        self._generators = [generator(seed, "sample", i) for i in indices]
        self._shape = (config.in_channels, config.sample_size, config.sample_size)
        self._device = device

    def __call__(self) -> Tensor:
        return normal(self._generators, self._shape, self._device)


@torch.no_grad()
def _denoise(model: Model, diffusion: GaussianDiffusion, x: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
    """The network's prediction of x_0, clipped to [-1, 1] before anything is built from it, and the share of the
    variance where that is learned."""
    batch = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
    output, share = diffusion.split(model(x, batch))
    return diffusion.predict_x0(x, batch, output).clamp(-1, 1), share


def _visits(diffusion: GaussianDiffusion, path: list[int]) -> Iterator[tuple[int, float, float]]:
    """(t, alpha_bar_t, alpha_bar of the timestep that follows), the last of which is 1: no noise is left.

    Raises:
        ValueError: the path is empty, does not fall, or leaves 0 ... T-1.
    """
    if not path or not diffusion.timesteps > path[0] >= path[-1] >= 0 or any(a <= b for a, b in pairwise(path)):
        raise ValueError(f"a path must fall from below {diffusion.timesteps} to 0 or above, not {path}")
    for i, t in enumerate(path):
        following = diffusion.alphas_cumprod[path[i + 1]] if i + 1 < len(path) else 1.0
        yield t, float(diffusion.alphas_cumprod[t]), float(following)


def ddpm(
    model: Model,
    diffusion: GaussianDiffusion,
    x: Tensor,
    path: list[int],
    noise: Callable[[], Tensor],
    *,
    variance: Variance = "fixed_small",
    eta: float = 0.0,
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), over all timesteps or a part of them.

    Args:
        x: the start noise, float32 (B, C, H, W).
        path: the timesteps to visit, from `timesteps`.
        noise: gives the next standard normal (B, C, H, W); not called at the last step.
        variance: of x_{t-1} given x_t: fixed_small is beta-tilde (eq. 7), fixed_large is beta, learned is the
            network's own between the two (Nichol & Dhariwal 2021, eq. 15).
        eta: not used; DDIM's.
    """
    for t, now, following in _visits(diffusion, path):
        x0, share = _denoise(model, diffusion, x, t)
        alpha = now / following  # alpha of the whole stride; with no step skipped, alpha_t
        beta = 1 - alpha
        # eq. 7: the mean of q(x_{t-1} | x_t, x_0)
        x = (math.sqrt(following) * beta / (1 - now)) * x0 + (math.sqrt(alpha) * (1 - following) / (1 - now)) * x
        if following < 1:
            small = beta * (1 - following) / (1 - now)
            if variance == "learned" and share is not None:
                sigma = torch.exp(0.5 * (math.log(small) + (share + 1) / 2 * math.log(beta / small)))
                x = x + sigma * noise()
            else:
                x = x + math.sqrt(beta if variance == "fixed_large" else small) * noise()
        yield Step(t, x, x0)


def ddim(
    model: Model,
    diffusion: GaussianDiffusion,
    x: Tensor,
    path: list[int],
    noise: Callable[[], Tensor],
    *,
    variance: Variance = "fixed_small",
    eta: float = 0.0,
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, eq. 12). eta 0 draws nothing after the start noise; eta 1 is ancestral sampling.

    Arguments as for `ddpm`; `variance` is not used.
    """
    for t, now, following in _visits(diffusion, path):
        x0, _ = _denoise(model, diffusion, x, t)
        epsilon = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
        sigma = eta * math.sqrt((1 - following) / (1 - now) * (1 - now / following))  # eq. 16
        rest = max(0.0, 1 - following - sigma**2)  # at eta 1 it may be 0, and rounded to below
        x = math.sqrt(following) * x0 + math.sqrt(rest) * epsilon
        if sigma > 0:
            x = x + sigma * noise()
        yield Step(t, x, x0)


def dpm_solver(
    model: Model,
    diffusion: GaussianDiffusion,
    x: Tensor,
    path: list[int],
    noise: Callable[[], Tensor],
    *,
    variance: Variance = "fixed_small",
    eta: float = 0.0,
) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2): second order, from the last two predictions.

    Arguments as for `ddpm`; `noise`, `variance` and `eta` are not used. The first step and the last, to no noise
    at all, are of first order.
    """
    before: tuple[Tensor, float] | None = None  # the last prediction of x_0, and the stride that was made with it
    for t, now, following in _visits(diffusion, path):
        x0, _ = _denoise(model, diffusion, x, t)
        if following == 1:
            x = x0
        else:
            stride = _log_snr(following) - _log_snr(now)  # h
            direction = x0
            if before is not None:
                r = before[1] / stride
                direction = x0 + (x0 - before[0]) / (2 * r)
            scale = math.sqrt((1 - following) / (1 - now))
            x = scale * x - math.sqrt(following) * math.expm1(-stride) * direction
            before = x0, stride
        yield Step(t, x, x0)


def _log_snr(alpha_bar: float) -> float:
    """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm_solver": dpm_solver}


def settings_name(params: Sample) -> str:
    """A file name for the settings that decide an image, apart from the seed: other settings have another name."""
    decisive = params.model_dump_json(exclude={"seed", "count", "batch_size", "grid"})
    return f"{params.sampler}-{params.steps}-steps-{hashlib.sha256(decisive.encode()).hexdigest()[:12]}"


def draw(
    model: UNet,
    diffusion: GaussianDiffusion,
    params: Sample,
    seed: int,
    count: int,
    device: torch.device,
    on_step: Callable[[int, int, Tensor], None] | None = None,
    keep: Keep = not_kept,
    class_counts: Sequence[int] = (),
) -> np.ndarray:
    """Samples 0 ... count-1 of a seed, in batches: uint8 (count, H, W, C), rounded to the nearest level.

    Of a class-conditional model, the classes are those of `class_sequence`.

    Args:
        params: sampler, steps, classes, guidance and batch size; its own seed and count are not used.
        on_step: is told (index of the batch's first sample, network evaluations so far, x (B, C, H, W)), from the
            start noise, at 0 evaluations, to the sample. (Of batches that are drawn now, not of those that were kept.)
        keep: keeps each finished batch.
        class_counts: training images of each class, for sample.class_frequencies = data.

    Raises:
        UserError: the model has fewer timesteps than steps are asked for, or not the classes or the guidance.
    """
    classes = class_sequence(params, model.config, class_counts, count)
    size, channels = model.config.sample_size, model.config.in_channels
    path = timesteps(diffusion.timesteps, params.steps, params.spacing)
    images = np.empty((count, size, size, channels), dtype=np.uint8)
    with Progress(count * len(path), f"{params.sampler}, {len(path)} evaluations an image", "eval") as bar:

        def one_batch(indices: range) -> np.ndarray:
            noise = ImageNoise(seed, indices, model.config, device)
            x = noise()
            if on_step:
                on_step(indices.start, 0, x)
            predict: Model = model
            if classes:
                labels = torch.tensor(classes[indices.start : indices.stop], device=device)
                predict = guided(model, labels, params.guidance)
            sampler = SAMPLERS[params.sampler]
            steps = sampler(predict, diffusion, x, path, noise, variance=params.variance, eta=params.eta)
            for i, step in enumerate(steps, 1):
                x = step.x
                if on_step:
                    on_step(indices.start, i, x)
                bar.update(len(indices))
            return to_pixels(x)

        name = f"{settings_name(params)}-seed-{seed}-images"
        batches = [range(rows.start, rows.stop) for rows in slices(count, params.batch_size)]
        kept = keep([(f"{name}-{batch.start}-{batch.stop}", partial(one_batch, batch)) for batch in batches])
        for batch, drawn in zip(batches, kept, strict=True):
            images[batch.start : batch.stop] = drawn
            bar.update(batch.stop * len(path) - bar.n)  # a batch that was kept
    return images
