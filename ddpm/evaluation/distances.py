"""The Fréchet distance between two sets of features (see `ddpm.evaluation.blocks`), with its standard error, its floor
and its limit for infinitely many samples."""

import math
from contextlib import nullcontext
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ddpm.core.seeding import generator
from ddpm.evaluation import estimates
from ddpm.evaluation.blocks import double, products, row_blocks, unit
from ddpm.evaluation.estimates import UNDEFINED, Estimate
from ddpm.runtime.progress import Progress

CPU = torch.device("cpu")
FLOOR_DRAWS = 5  # resamplings of the real images
SPLITS = 4  # the extrapolation takes the distances of all samples, of halves, thirds and quarters
IMAGES_PER_FEATURE = 4  # in the smallest part: with fewer, the distance is no longer a straight line in 1/N
ROUNDING = 1e-14  # an eigenvalue in units of the largest
NEGLIGIBLE = 1e-6  # a singular value in units of the largest: directions in which the samples do not vary


class Normal:
    """The normal distribution fitted to a set of features (N, D), in their own units.

    Attributes:
        mean: float64 (D,). trace: of the covariance, which is normalised by N - 1.
        covariance: float64 (D, D) where N > D; else None: its rank is at most N - 1, and the rows determine it.
    """

    def __init__(self, features: np.ndarray, device: torch.device = CPU, name: str | None = None) -> None:
        """`name`: the name of the set, to show progress; None shows none."""
        self.features, self.device = features, device
        count, width = features.shape
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.trace = 0.0
        self.covariance = torch.zeros(width, width, dtype=torch.float64, device=device) if count > width else None
        for rows in row_blocks(features):
            self.mean += double(features[rows], device).sum(0) / count
        with Progress(count, f"statistics of {name}", "img") if name else nullcontext() as bar:
            for rows in row_blocks(features):
                centred = double(features[rows], device) - self.mean
                self.trace += float(centred.square().sum()) / max(1, count - 1)
                if self.covariance is not None:
                    self.covariance.addmm_(centred.T, centred, alpha=1 / (count - 1))
                if bar is not None:
                    bar.update(rows.stop - rows.start)

    def packed(self) -> np.ndarray:
        """Covariance, its root, mean and trace in one array, float64 (2 D + 2, D)."""
        assert self.covariance is not None
        trace = torch.full_like(self.mean, self.trace)
        return torch.cat([self.covariance, self.root, self.mean[None], trace[None]]).cpu().numpy()

    @classmethod
    def unpacked(cls, features: np.ndarray, packed: np.ndarray, device: torch.device = CPU) -> "Normal":
        """Restore what `packed` returned, without recomputing it."""
        self, width = cls.__new__(cls), features.shape[1]
        self.features, self.device = features, device
        self.covariance, self.root, (self.mean, trace) = double(packed, device).split([width, width, 2])
        self.trace = float(trace[0])
        return self

    @cached_property
    def root(self) -> Tensor:
        """A matrix R with R^T R the covariance: the scaled rows (N, D), or its symmetric root (D, D)."""
        if self.covariance is None:
            return (double(self.features, self.device) - self.mean) / math.sqrt(len(self.features) - 1)
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(samples: Normal, real: Normal) -> Estimate:
    """The Fréchet distance of two normal distributions (Heusel et al. 2017, eq. 6); NaN if one is of a single image.

    The error is that of another draw of the samples, by the infinitesimal jackknife: the distance changes with the
    weight of a sample x, to first order, by 2 (m_s - m_r)(x - m_s) + |x - m_s|^2 - (x - m_s) A (x - m_s), where A maps
    one distribution onto the other (A S_s A = S_r). Far from the real images this error is exact for many samples; at
    the floor, where second-order terms matter, it is too large by a factor of at most sqrt(2).
    """
    if min(len(samples.features), len(real.features)) < 2:
        return UNDEFINED  # no covariance
    overlap, moved = _overlap(samples, real)
    influence = []
    for rows in row_blocks(samples.features):
        centred = double(samples.features[rows], samples.device) - samples.mean
        influence.append(2 * centred @ (samples.mean - real.mean) + centred.square().sum(1))
    scale = unit(samples.features) ** 2
    error = estimates.mean(((torch.cat(influence) - moved) / scale).cpu().numpy()).error
    return Estimate(_distance(samples, real, overlap), error)


def _distance(a: Normal, b: Normal, overlap: float) -> float:
    shift = float((a.mean - b.mean).square().sum())
    return max(0.0, shift + a.trace + b.trace - 2 * overlap) / unit(a.features) ** 2


def _matrix(a: Normal, b: Normal) -> tuple[Tensor, Tensor | None]:
    """A matrix with the eigenvalues of S_a S_b, of the size of the smaller set or of the number of features.

    With R^T R = S, the matrix is R_a S_b R_a^T, with a row for each image of a, where a set has fewer images than
    features and a is the smaller set; else R_b S_a R_b^T: a root is computed once per set, and b is used again.

    Returns:
        The matrix, and None for the first form; for the second the matrix from centred rows of a to rows of R_a R_b^T.
    """
    if a.covariance is not None:
        return b.root @ a.covariance @ b.root.T, b.root.T
    if b.covariance is not None:
        return a.root @ b.covariance @ a.root.T, None
    cross = products(a.features, b.features, a.device, (a.mean, b.mean)) / math.sqrt(len(b.features) - 1)
    if len(a.features) <= len(b.features):
        return cross @ cross.T / (len(a.features) - 1), None
    return cross.T @ cross / (len(a.features) - 1), cross


def _singular(eigenvalues: Tensor) -> Tensor:
    """The roots of the eigenvalues, but 0 for a rounding error: the root of 1e-16 would be 1e-8."""
    return eigenvalues.where(eigenvalues > ROUNDING * eigenvalues.max(), 0).sqrt()


def _overlap(a: Normal, b: Normal) -> tuple[float, Tensor]:
    """The trace of (S_a S_b)^(1/2), which is the sum of the singular values of R_a R_b^T; and (x - m_a) A (x - m_a) for
    each image x of a, float64 (N,), whose mean is about that trace."""
    matrix, projection = _matrix(a, b)
    values, vectors = torch.linalg.eigh(matrix)
    singular = _singular(values)
    if projection is None:
        return float(singular.sum()), (len(a.features) - 1) * (vectors.square() @ singular)
    kept = singular > NEGLIGIBLE * singular.max()
    turn = vectors[:, kept] / singular[kept].sqrt()
    if len(projection) == len(a.features):  # of each image already
        return float(singular.sum()), (projection @ turn).square().sum(1)
    turn = projection @ turn
    moved = [((double(a.features[rows], a.device) - a.mean) @ turn).square().sum(1) for rows in row_blocks(a.features)]
    return float(singular.sum()), torch.cat(moved)


def distance_alone(a: Normal, b: Normal) -> float:
    """`frechet_distance` without its error, which takes eigenvectors."""
    return _distance(a, b, float(_singular(torch.linalg.eigvalsh(_matrix(a, b)[0])).sum()))


def floor(real: Normal, count: int, seed: int) -> Estimate:
    """The Fréchet distance of a perfect sampler's `count` images: as many real images, drawn with replacement, several
    times. NaN where a set has a single image."""
    if min(count, len(real.features)) < 2:
        return UNDEFINED
    distances = []
    with Progress(FLOOR_DRAWS, "floor", "resampling") as bar:
        for i in range(FLOOR_DRAWS):
            rows = np.sort(generator(seed, "floor", i).integers(0, len(real.features), count))
            distances.append(distance_alone(Normal(real.features[rows], real.device), real))
            bar.update(1)
    return estimates.mean(np.array(distances))


def extrapolated(samples: Normal, real: Normal, whole: Estimate, seed: int) -> Estimate:
    """The Fréchet distance of infinitely many samples (Chong and Forsyth 2020): a straight line in 1/N through the
    distances of the samples and of their parts, halves to quarters; NaN where the parts would be too small.

    D_k, the mean distance of k equal parts, deviates from the line with a variance proportional to k - 1, and D_1, of
    all samples, not at all. With these weights the line meets 1/N = 0 at D_1 - sum (D_k - D_1) / sum (k - 1). The parts
    of every k are the same samples: the error that they share is the error of the distance itself.

    Args:
        whole: the distance of all samples.
    """
    count, width = samples.features.shape
    splits = [k for k in range(2, SPLITS + 1) if count // k >= IMAGES_PER_FEATURE * width]
    if not splits:
        return UNDEFINED
    rise = 0.0
    with Progress(sum(splits), "extrapolation", "part") as bar:
        for k in splits:
            for rows in np.array_split(generator(seed, "parts", k).permutation(count), k):
                part = distance_alone(Normal(samples.features[np.sort(rows)], samples.device), real)
                rise += (part - whole.value) / k
                bar.update(1)
    return Estimate(whole.value - rise / sum(k - 1 for k in splits), whole.error)
