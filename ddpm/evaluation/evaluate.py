"""One evaluation: how far the samples are from real images, and how well the network knows held-out ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm import pictures
from ddpm.config.schema import Evaluate, Sample
from ddpm.core.diffusion import GaussianDiffusion
from ddpm.core.unet import UNet
from ddpm.data.prepared import Prepared
from ddpm.errors import UserError
from ddpm.evaluation import distances, estimates, neighbours, pairs
from ddpm.evaluation.card import card, rounded, write_json
from ddpm.evaluation.estimates import Estimate, named
from ddpm.evaluation.held_out import HeldOut, image_losses, variational_bound
from ddpm.evaluation.neighbours import Nearest
from ddpm.evaluation.sets import FeatureSets
from ddpm.files import write_file
from ddpm.model_folder import TrainedModel
from ddpm.runtime import processes
from ddpm.runtime.resume import Store
from ddpm.runtime.tracking import Tracker
from ddpm.sampling import Classes, check_variance, chosen_classes, draw, settings_name

PAIRS, PAIR_COLUMNS = 24, 4  # in the picture of the nearest neighbours
BOUND_RANGES = 50  # points of the plots of the bound
PLOTS = ("loss_by_timestep", "bound_by_timestep", "fd_by_nfe")
Values = dict[str, float]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """What an evaluation works on.

    Attributes:
        settings: the section `evaluate`. drawn: the section `sample`, by which the samples were drawn.
        unet: on the device of `diffusion`.
        variants: models with other averages of the weights, by their widths; on the same device.
        samples: uint8 (N, H, W, C).
        data: the real images.
        classes: those of the model.
        store: runs the long loops.
    """

    settings: Evaluate
    drawn: Sample
    unet: UNet
    variants: Mapping[float, TrainedModel]
    diffusion: GaussianDiffusion
    samples: np.ndarray
    data: Prepared
    classes: Classes
    store: Store

    def held_out(self, count: int | None) -> HeldOut:
        """`count` held-out images, evenly spaced; with labels for a class-conditional model; None: all."""
        images, labels = self.data.test
        rows = np.linspace(0, len(images) - 1, min(count or len(images), len(images))).astype(int)
        return HeldOut(images[rows], labels[rows] if self.unet.config.classes else None, rows)


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation, ready to be written.

    Attributes:
        values: every number by its name, and its standard error by that name with _se.
        plots: rows of loss_by_timestep, bound_by_timestep and fd_by_nfe.
        neighbours: samples beside their nearest training images, those that look like copies first.
        card: a page of markdown: the numbers, and what they were measured with.
    """

    values: Values
    plots: dict[str, Rows]
    neighbours: Image.Image
    card: str

    def write(self, folder: Path, tracker: Tracker) -> None:
        """Write metrics.json, a JSON file for each plot, card.md and neighbours.png; record numbers and picture."""
        if processes.rank() == 0:
            for name, rows in self.plots.items():
                write_json(folder / f"{name}.json", rows)
            write_json(folder / "metrics.json", self.values)
            write_file(folder / "card.md", self.card.encode())
        tracker.log_picture(0, "neighbours", self.neighbours, folder)
        tracker.log(0, rounded(self.values))


def _check_fit(samples: np.ndarray, unet: UNet, info: Mapping[str, Any]) -> None:
    """Check that the samples and the network fit the data.

    Raises:
        UserError: their images have another shape or other classes than the data; or there are no samples.
    """

    def shown(shape: tuple[int, ...]) -> str:
        return "x".join(map(str, shape))

    shape, config = tuple(info["shape"]), unet.config
    if not len(samples):
        raise UserError("samples/images.npy: holds no image; run the stage sample again")
    if samples.shape[1:] != shape:
        raise UserError(
            f"samples/images.npy: holds images of {shown(samples.shape[1:])}, and data/prepared of {shown(shape)}; run "
            f"the stages train and sample again"
        )
    made = (config.sample_size, config.sample_size, config.in_channels)
    if made != shape:
        raise UserError(
            f"models/ddpm: draws images of {shown(made)}, and data/prepared holds {shown(shape)}; run the stage train "
            f"again"
        )
    if config.classes and config.classes != len(info["classes"]):
        raise UserError(
            f"models/ddpm: knows {config.classes} classes, and data/prepared {len(info['classes'])}; run the stage "
            f"train again"
        )


def evaluate(subject: Subject) -> Evaluation:
    """Measure all that the parameters ask for.

    Raises:
        UserError: samples, network and data do not fit together, or a setting does not fit them.
    """
    s, drawn = subject.settings, subject.drawn
    _check_fit(subject.samples, subject.unet, subject.data.info)
    check_variance(drawn, subject.diffusion)
    features = FeatureSets(s, subject.samples, subject.data, subject.store, subject.diffusion.device)
    near = neighbours.nearest(features["samples"], features["train"], features.device)
    measured = {
        "fidelity": fidelity(subject, features),
        "memorisation": memorisation(features, near),
        "loss_by_timestep": loss(subject),
        "bound_by_timestep": likelihood(subject),
        "fd_by_nfe": cost_curve(subject, features),
    }
    values = {name: value for part, _ in measured.values() for name, value in part.items()}
    values |= {"samples": len(subject.samples), "seeds": s.seeds, "nfe": _nfe(drawn)}
    values |= {"reference_images": len(features[features.reference]), "train_images": len(features["train"])}
    plots = {name: measured[name][1] for name in PLOTS}
    names = [subject.data.info["classes"][i] for i in chosen_classes(drawn, subject.unet.config, subject.classes.names)]
    shown = np.argsort(~near.suspicious(), kind="stable")[:PAIRS]
    originals = subject.data.train.images[features.rows["train"][near.place[shown]]]
    picture = pictures.pairs(subject.samples[shown], originals, PAIR_COLUMNS)
    extractor = features.extractor
    page = card(values, s, drawn, subject.data.info, str(extractor), extractor.digest, names)
    return Evaluation(values, plots, picture, page)


def fidelity(subject: Subject, features: FeatureSets) -> tuple[Values, Rows]:
    """How far the samples are from real images, and real images from each other; no plot."""
    s, reference = subject.settings, features.reference
    samples, real = features.normal("samples"), features.normal(reference)
    distance = features.frechet("samples", reference)
    floor = distances.floor(real, len(subject.samples), s.seed)
    found = {
        "": distance,
        "_floor": floor,
        "_ratio": estimates.ratio(distance, floor),
        "_infinite": distances.extrapolated(samples, real, distance, s.seed),
        "_train": features.frechet("samples", "train"),
        "_test": features.frechet("samples", "test"),
        "_real_test": features.frechet("test", "train"),
    }
    if s.seeds > 1:
        further = (
            subject.drawn.model_copy(update={"seed": subject.drawn.seed + i, "count": len(subject.samples)})
            for i in range(1, s.seeds)
        )
        others = (_drawn_distance(subject, features, settings).value for settings in further)
        found["_mean"] = estimates.mean(np.array([distance.value, *others]))
    for width, model in subject.variants.items():  # kept batches are named by the settings, width included
        same = subject.drawn.model_copy(update={"ema_width": width, "count": len(subject.samples)})
        found[f"_ema_{width:g}"] = _drawn_distance(replace(subject, unet=model.unet), features, same)
    found = {f"frechet_distance{which}": estimate for which, estimate in found.items()}
    found |= pairs.compare(features["samples"], features.real_pairs(), s.neighbours, s.seed, features.device)
    return _values(found), []


def memorisation(features: FeatureSets, near: Nearest) -> tuple[Values, Rows]:
    """How near the samples come to the training images, given the nearest ones; no plot."""
    held_out = neighbours.nearest(features["test"], features["train"], features.device)
    found = {
        "memorisation_ratio": neighbours.memorisation_ratio(near, held_out),
        "copies": neighbours.copies(near),
        "copies_held_out": neighbours.copies(held_out),
    }
    return _values(found), []


def _values(found: Mapping[str, Estimate]) -> Values:
    return {key: value for name, estimate in found.items() for key, value in named(name, estimate).items()}


def loss(subject: Subject) -> tuple[Values, Rows]:
    """How well the held-out images are denoised, by timestep: the simple loss, and the bound's part beside it."""
    s = subject.settings
    losses = image_losses(
        subject.unet,
        subject.diffusion,
        subject.held_out(s.loss_images),
        bins=s.loss_bins,
        batch_size=s.batch_size,
        seed=s.seed,
        store=subject.store,
    )
    parts = dict(zip(("loss", "bound_loss"), losses, strict=False))  # (N, bins) each
    times = [round((i + 0.5) / s.loss_bins * subject.diffusion.timesteps) for i in range(s.loss_bins)]
    curves = zip(times, *(part.mean(axis=0).tolist() for part in parts.values()), strict=True)
    rows = [dict(zip(("timestep", *parts), row, strict=True)) for row in curves]
    return _values({f"held_out_{name}": estimates.mean(part.mean(axis=1)) for name, part in parts.items()}), rows


def likelihood(subject: Subject) -> tuple[Values, Rows]:
    """How likely the held-out images are: the whole bound, and its terms summed over equal ranges of t."""
    s = subject.settings
    if not s.bound_images:
        return {}, []
    bound = variational_bound(
        subject.unet,
        subject.diffusion,
        subject.held_out(s.bound_images),
        variance=subject.drawn.variance,
        batch_size=s.batch_size,
        seed=s.seed,
        store=subject.store,
    )
    return named("bits_per_dim", Estimate(bound.bits_per_dim, bound.error)), bound.rows(BOUND_RANGES)


def cost_curve(subject: Subject, features: FeatureSets) -> tuple[Values, Rows]:
    """The distance by network evaluations: the points of `evaluate.nfe_curve`, or without one the samples' own point.

    A distance that is not defined has no point.
    """
    points = [  # fixed_small, since fixed_large collapses where steps are skipped
        subject.drawn.model_copy(
            update={
                "sampler": line.sampler,
                "steps": steps,
                "variance": "fixed_small",
                "count": subject.settings.nfe_samples,
            }
        )
        for line in subject.settings.nfe_curve
        for steps in line.steps
    ]
    curve = [(point, _drawn_distance(subject, features, point)) for point in points]
    if not curve:
        curve = [(subject.drawn, features.frechet("samples", features.reference))]
    return {}, [
        {"sampler": settings.sampler, "nfe": _nfe(settings)} | named("frechet_distance", distance)
        for settings, distance in curve
        if not math.isnan(distance.value)
    ]


def _nfe(settings: Sample) -> int:
    """Network evaluations per image: guidance takes two per step."""
    return settings.steps * (1 if settings.guidance == 1 else 2)


def _drawn_distance(subject: Subject, features: FeatureSets, settings: Sample) -> Estimate:
    """The Fréchet distance of newly drawn samples to the reference."""
    images = draw(subject.unet, subject.diffusion, settings, subject.classes, subject.store)
    name = f"{settings_name(settings)}-seed-{settings.seed}"
    fitted = distances.Normal(features.extract(images, name), features.device, "new samples")
    return distances.frechet_distance(fitted, features.normal(features.reference))
