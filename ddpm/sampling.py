"""Samples 0 ... n-1 of a model: their classes, their batches, which survive a kill, and a film of the first ones."""

import hashlib
import heapq
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm.config.schema import Runtime, Sample
from ddpm.core.diffusion import GaussianDiffusion
from ddpm.core.pixels import to_pixels
from ddpm.core.samplers import SAMPLERS, ImageNoise, Model, guided, timesteps
from ddpm.core.unet import UNet, UNetConfig
from ddpm.errors import UserError
from ddpm.model_folder import TrainedModel
from ddpm.pictures import film_images
from ddpm.runtime.device import memory_format
from ddpm.runtime.progress import Progress
from ddpm.runtime.resume import Store

STRIP_ROWS, STRIP_COLUMNS = 6, 11  # images and moments of the strip
FILM_MOMENTS = 25


class Classes(NamedTuple):
    """The classes of a model, in the order of its labels: their names, and how many training images each has.

    Either is empty where the model folder does not hold it.
    """

    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()


UNKNOWN = Classes()
OnStep = Callable[[int, int, Tensor], None]  # see `draw`
Draw = Callable[[int, OnStep], object]  # draws so many samples, and reports each state to the callback


def chosen_classes(params: Sample, config: UNetConfig, names: Sequence[str]) -> list[int]:
    """The classes to draw, in turn: all of the network's, or those of `sample.classes`; empty if unconditional.

    Raises:
        UserError: a class or guidance that the network does not have.
    """
    names = list(names) or [str(i) for i in range(config.classes)]
    if params.guidance != 1 and config.no_label is None:
        raise UserError(
            f"params.yaml: sample.guidance = {params.guidance:g}: must be 1 (no guidance), since models/ddpm has not "
            f"learnt to do without a label"
        )
    wanted = names if params.classes is None else [str(name) for name in params.classes]
    for name in wanted:
        if name not in names:
            allowed = f"known: {', '.join(names[:50])}" if names else "models/ddpm is unconditional; set it to null"
            raise UserError(f"params.yaml: sample.classes: {name!r} is not a class of models/ddpm; {allowed}")
    return [names.index(name) for name in wanted]


def class_sequence(params: Sample, config: UNetConfig, classes: Classes, count: int) -> list[int]:
    """The classes of samples 0 ... count-1; empty if the network is unconditional. A prefix of a longer sequence.

    equal: each class in turn. data: as often as the training data has them, by Sainte-Laguë's rule: sample i is of
    the class with the largest c / (2 n + 1), where c is the number of its training images and n that of its samples
    before i. The first k samples are then the best rounding of the data's frequencies to k samples, for every k.

    Raises:
        UserError: as for `chosen_classes`; or the numbers of images are not known, or are all 0.
    """
    chosen, counts = chosen_classes(params, config, classes.names), classes.counts
    if params.class_frequencies == "equal":
        return [chosen[i % len(chosen)] for i in range(count)] if chosen else []
    setting = "params.yaml: sample.class_frequencies = data"
    if not chosen:
        raise UserError(f"{setting}: models/ddpm is unconditional; set it to equal")
    if len(counts) != config.classes:
        raise UserError(
            f"{setting}: models/ddpm/training.json does not hold the class_counts of its {config.classes} classes; set "
            f"it to equal, or train here"
        )
    queue = [(Fraction(1, counts[c]), c) for c in dict.fromkeys(chosen) if counts[c]]
    if not queue:
        raise UserError(f"{setting}: the data has no image of sample.classes = {params.classes}; set it to equal")
    heapq.heapify(queue)
    drawn = []
    for _ in range(count):
        price, label = queue[0]  # (2 n + 1) / c
        drawn.append(label)
        heapq.heapreplace(queue, (price + Fraction(2, counts[label]), label))
    return drawn


def check_variance(params: Sample, diffusion: GaussianDiffusion) -> None:
    """Check `sample.variance` against the network, and print a note where a learned variance is not used.

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


def sampling_path(params: Sample, diffusion: GaussianDiffusion) -> list[int]:
    """The timesteps that the samples visit, from noisy to clean.

    Raises:
        UserError: the model has fewer timesteps than `sample.steps`.
    """
    try:
        return timesteps(diffusion.timesteps, params.steps, params.spacing)
    except ValueError as error:
        raise UserError(f"params.yaml: sample.{error}") from None


def place(model: TrainedModel, runtime: Runtime, device: torch.device, *variants: TrainedModel) -> GaussianDiffusion:
    """Move the networks of the model and its variants to the device, in the memory format that is fastest there; return
    the model's diffusion on that device."""
    for each in (model, *variants):
        each.unet.to(device).to(memory_format=memory_format(runtime, device))
    return GaussianDiffusion(model.diffusion, device)


def check_settings(params: Sample, model: UNet, diffusion: GaussianDiffusion, classes: Classes) -> None:
    """Refuse before any work what `draw` would refuse, and a variance that the network has not learned.

    Raises:
        UserError: a setting that does not fit the model.
    """
    check_variance(params, diffusion)
    sampling_path(params, diffusion)
    class_sequence(params, model.config, classes, 0)


def settings_name(params: Sample) -> str:
    """A file name for the settings that decide an image, apart from the seed: other settings have another name."""
    decisive = params.model_dump_json(exclude={"seed", "count", "batch_size", "grid"})
    return f"{params.sampler}-{params.steps}-steps-{hashlib.sha256(decisive.encode()).hexdigest()[:12]}"


def draw(
    model: UNet,
    diffusion: GaussianDiffusion,
    params: Sample,
    classes: Classes = UNKNOWN,
    store: Store | None = None,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """Samples 0 ... count-1 of a seed, in batches: uint8 (count, H, W, C), rounded to the nearest level.

    Of a class-conditional model, the classes are those of `class_sequence`.

    Args:
        model: on the device of `diffusion`.
        classes: those of the model.
        store: runs the batches; None: nothing is kept.
        on_step: called with (index of the batch's first sample, network evaluations so far, x (B, C, H, W)), from the
            start noise, at 0 evaluations, to the sample; not for batches that are read back.

    Raises:
        UserError: the model has fewer timesteps than `sample.steps`, or lacks the classes or the guidance.
    """
    store, config, device = store or Store(), model.config, diffusion.device
    labels = class_sequence(params, config, classes, params.count)
    path = sampling_path(params, diffusion)
    images = np.empty((params.count, config.sample_size, config.sample_size, config.in_channels), dtype=np.uint8)

    def one_batch(rows: slice) -> np.ndarray:
        noise = ImageNoise(params.seed, range(rows.start, rows.stop), config, device)
        x = noise()
        if on_step:
            on_step(rows.start, 0, x)
        predict: Model = model
        if labels:
            predict = guided(model, torch.tensor(labels[rows], device=device), params.guidance)
        sampler = SAMPLERS[params.sampler]
        steps = sampler(predict, diffusion, x, path, noise, variance=params.variance, eta=params.eta)
        for evaluations, step in enumerate(steps, 1):
            x = step.x
            if on_step:
                on_step(rows.start, evaluations, x)
            bar.update(len(x))
        return to_pixels(x)

    title = f"{params.sampler}, {len(path)} evaluations per image"
    with Progress(params.count * len(path), title, "eval") as bar:
        name = f"{settings_name(params)}-seed-{params.seed}-images"
        for rows, batch in store.batches(name, params.count, params.batch_size, one_batch, bar):
            images[rows] = batch
    return images


class Moments:
    """The states of the first samples, for a strip and a film of the denoising. Kept in the store.

    Args:
        steps: network evaluations per sample.
        count: samples that are drawn. batch_size: samples per batch.
        values: numbers per image.
    """

    def __init__(self, steps: int, count: int, batch_size: int, values: int, store: Store) -> None:
        self._steps, self._store = steps, store
        self._film_images = film_images(values)
        self._images = min(count, max(STRIP_ROWS, self._film_images))
        self._batches = [slice(start, min(start + batch_size, self._images)) for start in range(0, count, batch_size)]
        self._strip = {0} | {round(i) + 1 for i in np.linspace(0, steps - 1, STRIP_COLUMNS - 1)}
        self._film = {round(i) for i in np.linspace(0, steps, FILM_MOMENTS)}
        self._moments = sorted(self._strip | self._film)  # in network evaluations so far
        self._seen: dict[int, list[np.ndarray]] = {}  # by the first image of a batch

    def watch(self, start: int, evaluations: int, x: Tensor) -> None:
        """Take the state x (B, C, H, W) of the batch from image `start` on; at the last evaluation, keep its states."""
        self._record(start, evaluations, x)
        if start < self._images and evaluations == self._steps:  # before the batch is kept, which may end the run
            self._store.kept(_name(start), lambda: np.stack(self._seen.pop(start)))

    def _record(self, start: int, evaluations: int, x: Tensor) -> None:
        if start < self._images and evaluations in self._moments:
            self._seen.setdefault(start, []).append(to_pixels(x[: self._images - start]))

    def pictures(self, draw: Draw) -> tuple[np.ndarray, list[np.ndarray]]:
        """The strip, uint8 (rows, moments, H, W, C), a row for each image, and the film, uint8 (N, H, W, C) each.

        Args:
            draw: draws the first samples again, if their kept states are damaged.
        """

        def again(rows: slice) -> np.ndarray:
            self._seen.clear()
            draw(rows.stop, self._record)
            return np.stack(self._seen[rows.start])

        batches = [rows for rows in self._batches if rows.start < self._images]
        kept = [self._store.kept(_name(rows.start), lambda rows=rows: again(rows)) for rows in batches]  # type: ignore[misc]
        states = dict(zip(self._moments, np.concatenate(kept, axis=1), strict=True))
        strip = np.stack([states[i][:STRIP_ROWS] for i in sorted(self._strip)], axis=1)
        return strip, [states[i][: self._film_images] for i in sorted(self._film)]


def _name(start: int) -> str:
    return f"moments-{start}"


class Drawn(NamedTuple):
    """The samples, uint8 (N, H, W, C), and how the first ones appear: see `Moments.pictures`."""

    images: np.ndarray
    strip: np.ndarray
    film: list[np.ndarray]


def draw_filmed(model: UNet, diffusion: GaussianDiffusion, params: Sample, classes: Classes, store: Store) -> Drawn:
    """The samples of `draw`, with a strip and a film of the denoising of the first ones.

    Raises:
        UserError: as for `draw`.
    """
    steps, values = len(sampling_path(params, diffusion)), model.config.in_channels * model.config.sample_size**2
    print(f"{params.count} images by {params.sampler}, {steps} network evaluations each", flush=True)
    moments = Moments(steps, params.count, params.batch_size, values, store)
    images = draw(model, diffusion, params, classes, store, moments.watch)

    def again(count: int, on_step: OnStep) -> None:
        draw(model, diffusion, params.model_copy(update={"count": count}), classes, on_step=on_step)

    return Drawn(images, *moments.pictures(again))
