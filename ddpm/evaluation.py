"""One evaluation: how far the samples are from real images, and how well the network knows held-out ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm import metrics, pictures, report, samplers
from ddpm.bound import variational_bound
from ddpm.checkpoint import Keep
from ddpm.config import Evaluate, Sample
from ddpm.diffusion import GaussianDiffusion
from ddpm.unet import UNet

PAIRS, PAIR_COLUMNS = 24, 4  # of the picture of the nearest neighbours
BOUND_RANGES = 50  # points of the plots of the bound
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Split:
    """A split of the prepared data: images uint8 (N, H, W, C), labels int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """What there is to write.

    Attributes:
        values: every number, by its name.
        plots: rows of loss_by_timestep, bound_by_timestep and fd_by_nfe.
        neighbours: samples beside their nearest training images.
        card: a page of markdown that tells what the numbers were measured with.
    """

    values: dict[str, float]
    plots: dict[str, Rows]
    neighbours: Image.Image
    card: str


def evaluate(
    p: Evaluate,
    drawn: Sample,
    unet: UNet,
    diffusion: GaussianDiffusion,
    samples: np.ndarray,
    train: Split,
    test: Split,
    info: Mapping[str, Any],
    device: torch.device,
    keep: Keep,
) -> Evaluation:
    """Measure all that the parameters ask for.

    Args:
        drawn: how the samples were drawn.
        samples: uint8 (N, H, W, C).
        info: the content of dataset.json.
        keep: keeps the parts of the long loops.
    """

    def features(images: np.ndarray, name: str) -> Tensor:
        return metrics.extract_features(images, p.features, p.inception_weights, p.batch_size, device, keep, name)

    def nfe(settings: Sample) -> int:
        """Network evaluations an image: guidance takes two a step."""
        steps = samplers.timesteps(diffusion.timesteps, settings.steps, settings.spacing)
        return len(steps) * (1 if settings.guidance == 1 else 2)

    def distance(settings: Sample, seed: int, count: int) -> float:
        """The Fréchet distance of newly drawn samples."""
        new = samplers.draw(unet, diffusion, settings, seed, count, device, keep=keep)
        return metrics.frechet_distance(features(new, f"{settings.sampler}-{nfe(settings)}-seed-{seed}"), real)

    def held_out(count: int | None) -> tuple[np.ndarray, np.ndarray | None]:
        """That many held-out images, evenly spaced, and their labels for a class-conditional model."""
        total = len(test.images)
        rows = np.linspace(0, total - 1, min(count or total, total)).astype(int)
        return test.images[rows], test.labels[rows] if unet.config.classes else None

    # how far from real images
    fake, of_train, of_test = (
        features(images, name)
        for images, name in ((samples, "samples"), (train.images, "train"), (test.images, "test"))
    )
    real = {"train": of_train, "test": of_test, "all": torch.cat([of_train, of_test])}[p.reference]
    values = metrics.compare(fake, real, neighbours=p.neighbours, kid_subset_size=p.kid_subset_size, seed=p.seed)
    if p.seeds > 1:
        sets = [values["frechet_distance"]]
        sets += [distance(drawn, drawn.seed + i, len(samples)) for i in range(1, p.seeds)]
        values |= {"frechet_distance_mean": float(np.mean(sets)), "frechet_distance_std": float(np.std(sets, ddof=1))}
    values["frechet_distance_train"] = metrics.frechet_distance(fake, of_train)
    values["frechet_distance_test"] = metrics.frechet_distance(fake, of_test)
    values["frechet_distance_real_halves"] = metrics.real_floor(real, p.seed)
    values["frechet_distance_real_test"] = metrics.frechet_distance(of_test, of_train)

    # how far from the training images
    to_train, index = metrics.nearest(fake, of_train, device)
    values["memorisation_ratio"] = metrics.memorisation_ratio(to_train, metrics.nearest(of_test, of_train, device)[0])
    neighbours = pictures.pairs(samples[:PAIRS], train.images[index[:PAIRS]], PAIR_COLUMNS)

    # how well the held-out images are denoised
    options: Any = {"batch_size": p.batch_size, "seed": p.seed, "device": device, "keep": keep}
    losses = metrics.held_out_loss(unet, diffusion, *held_out(p.loss_images), bins=p.loss_bins, **options)
    values["held_out_loss"] = sum(losses) / len(losses)
    times = [round((i + 0.5) / len(losses) * diffusion.timesteps) for i in range(len(losses))]
    plots: dict[str, Rows] = {
        "loss_by_timestep": [{"timestep": t, "loss": loss} for t, loss in zip(times, losses, strict=True)],
        "bound_by_timestep": [],
    }

    # how likely they are: the whole bound, and its terms summed over equal ranges of t
    if p.bound_images:
        bound = variational_bound(unet, diffusion, *held_out(p.bound_images), variance=drawn.variance, **options)
        values["bits_per_dim"] = bound.bits_per_dim
        plots["bound_by_timestep"] = bound.rows(BOUND_RANGES)

    # how the distance falls with the network evaluations; where no curve is asked for, the one point that is known
    points = [  # fixed_small, since fixed_large collapses where steps are skipped
        drawn.model_copy(update={"sampler": line.sampler, "steps": steps, "variance": "fixed_small"})
        for line in p.nfe_curve
        for steps in line.steps
    ]
    curve = [(point, distance(point, point.seed, p.nfe_samples)) for point in points]
    curve = curve or [(drawn, values["frechet_distance"])]
    plots["fd_by_nfe"] = [{"sampler": s.sampler, "nfe": nfe(s), "frechet_distance": value} for s, value in curve]

    values |= {"samples": len(samples), "seeds": p.seeds, "nfe": nfe(drawn), "reference_images": len(real)}
    digest = metrics.weights_digest(p.features, p.inception_weights)
    names = [info["classes"][i] for i in samplers.chosen_classes(drawn, unet.config)]
    return Evaluation(values, plots, neighbours, report.card(values, p, drawn, info, digest, names))
