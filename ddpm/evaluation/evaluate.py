"""One evaluation: how far the samples are from real images, and how well the network knows held-out ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddpm import pictures
from ddpm.config.schema import Evaluate, Sample
from ddpm.core import samplers
from ddpm.core.bound import variational_bound
from ddpm.core.diffusion import GaussianDiffusion
from ddpm.core.unet import UNet
from ddpm.errors import UserError
from ddpm.evaluation import card, distances, metrics
from ddpm.runtime.resume import Keep

PAIRS, PAIR_COLUMNS = 24, 4  # of the picture of the nearest neighbours
BOUND_RANGES = 50  # points of the plots of the bound
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Split:
    """A split of the prepared data: images uint8 (N, H, W, C), labels int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray

    def spread(self, count: int | None) -> np.ndarray:
        """The places of `count` of its images, evenly spaced, (n,); of all for None, or where there are fewer."""
        total = len(self.images)
        return np.linspace(0, total - 1, min(count or total, total)).astype(int)


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


def check_fit(samples: np.ndarray, unet: UNet, info: Mapping[str, Any]) -> None:
    """Compare the samples and the network with the data.

    Raises:
        UserError: they are of images of another shape, or of other classes; or there are no samples.
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


@dataclass(frozen=True)
class Evaluator:
    """What an evaluation works with.

    Attributes:
        p: what to measure. drawn: how the samples were drawn.
        samples: uint8 (N, H, W, C).
        info: the content of dataset.json.
        keep: keeps the parts of the long loops.
        class_counts: training images of each class, for sample.class_frequencies = data.
    """

    p: Evaluate
    drawn: Sample
    unet: UNet
    diffusion: GaussianDiffusion
    samples: np.ndarray
    train: Split
    test: Split
    info: Mapping[str, Any]
    device: torch.device
    keep: Keep
    class_counts: tuple[int, ...] = ()
    _fitted: dict[str, distances.Normal] = field(default_factory=dict)

    def run(self) -> Evaluation:
        """Measure all that the parameters ask for.

        Raises:
            UserError: samples, network and data do not fit together, or a setting not to them.
        """
        check_fit(self.samples, self.unet, self.info)
        samplers.check_variance(self.drawn, self.diffusion)
        features = {
            name: self._features(images, name)
            for name, images in (
                ("samples", self.samples),
                ("train", self.train.images),
                ("test", self.test.images),
            )
        }
        if self.p.reference == "all":
            features["all"] = np.concatenate([features["train"], features["test"]])
        values = self._distances(features)
        real = self._normal(features[self.p.reference], self.p.reference)
        if self.p.seeds > 1:
            seeds = range(self.drawn.seed + 1, self.drawn.seed + self.p.seeds)
            sets = [values["frechet_distance"]]
            sets += [self._drawn_distance(self.drawn, seed, len(self.samples), real) for seed in seeds]
            values["frechet_distance_mean"] = float(np.mean(sets))
            values["frechet_distance_std"] = float(np.std(sets, ddof=1))
        memorisation, neighbours = self._memorisation(features)
        losses, loss_by_timestep = self._losses()
        bound, bound_by_timestep = self._bound()
        values |= memorisation | losses | bound
        plots = {
            "loss_by_timestep": loss_by_timestep,
            "bound_by_timestep": bound_by_timestep,
            "fd_by_nfe": self._curve(values["frechet_distance"], real),
        }
        values |= {"samples": len(self.samples), "seeds": self.p.seeds, "nfe": self._nfe(self.drawn)}
        values["reference_images"] = len(features[self.p.reference])
        digest = metrics.weights_digest(self.p.features, self.p.inception_weights)
        names = [self.info["classes"][i] for i in samplers.chosen_classes(self.drawn, self.unet.config)]
        return Evaluation(values, plots, neighbours, card.card(values, self.p, self.drawn, self.info, digest, names))

    def _features(self, images: np.ndarray, name: str) -> np.ndarray:
        p = self.p
        return metrics.extract_features(
            images, p.features, p.inception_weights, p.batch_size, self.device, self.keep, name
        )

    def _normal(self, features: np.ndarray, name: str) -> distances.Normal:
        """The statistics of a set, computed once."""
        if name not in self._fitted:
            self._fitted[name] = distances.Normal(features, self.device, name)
        return self._fitted[name]

    def _distances(self, features: Mapping[str, np.ndarray]) -> dict[str, float]:
        """How far the samples are from real images, and real images from each other."""
        p, samples, real = self.p, features["samples"], features[self.p.reference]

        def frechet(a: str, b: str) -> float:
            return distances.frechet_distance(self._normal(features[a], a), self._normal(features[b], b))

        values = {"frechet_distance": frechet("samples", p.reference)}
        values["kid"], values["kid_std"] = distances.kernel_distance(
            samples, real, subset_size=p.kid_subset_size, seed=p.seed, device=self.device
        )
        values["precision"], values["recall"] = distances.precision_recall(samples, real, p.neighbours, self.device)
        for name in ("train", "test"):
            known = name == p.reference
            values[f"frechet_distance_{name}"] = values["frechet_distance"] if known else frechet("samples", name)
        values["frechet_distance_real_halves"] = distances.real_floor(real, p.seed, self.device)
        values["frechet_distance_real_test"] = frechet("test", "train")
        return values

    def _memorisation(self, features: Mapping[str, np.ndarray]) -> tuple[dict[str, float], Image.Image]:
        """How far the samples are from the training images, and a picture of the nearest."""
        to_train, index = distances.nearest(features["samples"], features["train"], self.device)
        held_out, _ = distances.nearest(features["test"], features["train"], self.device)
        picture = pictures.pairs(self.samples[:PAIRS], self.train.images[index[:PAIRS]], PAIR_COLUMNS)
        return {"memorisation_ratio": distances.memorisation_ratio(to_train, held_out)}, picture

    def _held_out(self, count: int | None) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """That many held-out images, their labels for a class-conditional model, and their places in the split."""
        rows = self.test.spread(count)
        return self.test.images[rows], self.test.labels[rows] if self.unet.config.classes else None, rows

    def _losses(self) -> tuple[dict[str, float], Rows]:
        """How well the held-out images are denoised: the simple loss, and the bound's part beside it."""
        p, parts = self.p, {}
        parts["loss"], bound = metrics.held_out_loss(
            self.unet,
            self.diffusion,
            *self._held_out(p.loss_images),
            bins=p.loss_bins,
            batch_size=p.batch_size,
            seed=p.seed,
            device=self.device,
            keep=self.keep,
        )
        if bound is not None:
            parts["bound_loss"] = bound
        times = [round((i + 0.5) / p.loss_bins * self.diffusion.timesteps) for i in range(p.loss_bins)]
        rows = [dict(zip(("timestep", *parts), row, strict=True)) for row in zip(times, *parts.values(), strict=True)]
        return {f"held_out_{name}": sum(part) / len(part) for name, part in parts.items()}, rows

    def _bound(self) -> tuple[dict[str, float], Rows]:
        """How likely the held-out images are: the whole bound, and its terms summed over equal ranges of t."""
        p = self.p
        if not p.bound_images:
            return {}, []
        bound = variational_bound(
            self.unet,
            self.diffusion,
            *self._held_out(p.bound_images),
            variance=self.drawn.variance,
            batch_size=p.batch_size,
            seed=p.seed,
            device=self.device,
            keep=self.keep,
        )
        return {"bits_per_dim": bound.bits_per_dim}, bound.rows(BOUND_RANGES)

    def _nfe(self, settings: Sample) -> int:
        """Network evaluations per image: guidance takes two per step."""
        return settings.steps * (1 if settings.guidance == 1 else 2)

    def _drawn_distance(self, settings: Sample, seed: int, count: int, real: distances.Normal) -> float:
        """The Fréchet distance of newly drawn samples."""
        images = samplers.draw(
            self.unet,
            self.diffusion,
            settings,
            seed,
            count,
            self.device,
            keep=self.keep,
            class_counts=self.class_counts,
        )
        name = f"{samplers.settings_name(settings)}-seed-{seed}"
        fitted = distances.Normal(self._features(images, name), self.device, "new samples")
        return distances.frechet_distance(fitted, real)

    def _curve(self, headline: float, real: distances.Normal) -> Rows:
        """How the distance falls with the network evaluations; the one point that is known where no curve is asked for.

        A distance that is not defined has no point.
        """
        points = [  # fixed_small, since fixed_large collapses where steps are skipped
            self.drawn.model_copy(update={"sampler": line.sampler, "steps": steps, "variance": "fixed_small"})
            for line in self.p.nfe_curve
            for steps in line.steps
        ]
        curve = [(point, self._drawn_distance(point, point.seed, self.p.nfe_samples, real)) for point in points]
        return [
            {"sampler": settings.sampler, "nfe": self._nfe(settings), "frechet_distance": value}
            for settings, value in curve or [(self.drawn, headline)]
            if not math.isnan(value)
        ]
