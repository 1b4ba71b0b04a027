"""Distances between two sets of features: Fréchet, kernel, precision and recall, nearest neighbours.

Features are arrays (N, D): floats, or uint8 for pixels, whose levels stand for level / 255. Everything is computed in
float64 from blocks of them, so no whole copy in float64 is made. The inner products of pixels are exact integers then:
they depend neither on the block nor on the machine.
"""

import math
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_kid import mmd2

from ddpm.core.seeding import generator
from ddpm.runtime.progress import Progress

BLOCK = 2**22  # features in a block: 32 MiB of float64, for which memory is soon found
PAIRS = 2**25  # distances in a block: 256 MiB
KID_SUBSETS = 100
CPU = torch.device("cpu")


def _unit(features: np.ndarray) -> float:
    """What one unit of the features is divided by, so that pixels lie in [0, 1]."""
    return 255.0 if features.dtype == np.uint8 else 1.0


def _double(block: np.ndarray, device: torch.device) -> Tensor:
    """A block in float64, in the features' own units."""
    return torch.from_numpy(np.array(block)).to(device).double()  # np.array: torch wants memory that may be written


def _row_blocks(features: np.ndarray, others: int = 0) -> Iterator[slice]:
    """Rows in blocks that fit `BLOCK`, or `PAIRS` with so many others."""
    size = max(1, PAIRS // others if others else BLOCK // max(1, features.shape[1]))
    return (slice(start, min(start + size, len(features))) for start in range(0, len(features), size))


def products(a: np.ndarray, b: np.ndarray, device: torch.device, means: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The inner product of each row of a (N, D) with each of b (M, D), in their own units: float64 (N, M).

    Args:
        means: what to subtract from all rows of a and of b, float64 (D,) each.
    """
    out = torch.zeros(len(a), len(b), dtype=torch.float64, device=device)
    width = max(1, BLOCK // max(1, len(a) + len(b)))
    for start in range(0, a.shape[1], width):
        columns = slice(start, start + width)
        left, right = _double(a[:, columns], device), _double(b[:, columns], device)
        if means is not None:
            left, right = left - means[0][columns], right - means[1][columns]
        out.addmm_(left, right.T)
    return out


class Normal:
    """The normal distribution fitted to a set of features (N, D), in their own units.

    Attributes:
        mean: float64 (D,). trace: of the covariance, which is divided by N - 1.
        covariance: float64 (D, D) where N > D; else None: it has rank N - 1 at most, and the rows say all of it.
    """

    def __init__(self, features: np.ndarray, device: torch.device = CPU, name: str = "features") -> None:
        self.features, self.device = features, device
        count, width = features.shape
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.trace = 0.0
        self.covariance = torch.zeros(width, width, dtype=torch.float64, device=device) if count > width else None
        with Progress(count, f"statistics of {name}", "img") as bar:
            for rows in _row_blocks(features):
                self.mean += _double(features[rows], device).sum(0) / count
            for rows in _row_blocks(features):
                centred = _double(features[rows], device) - self.mean
                self.trace += float(centred.square().sum()) / max(1, count - 1)
                if self.covariance is not None:
                    self.covariance.addmm_(centred.T, centred, alpha=1 / (count - 1))
                bar.update(rows.stop - rows.start)

    @cached_property
    def root(self) -> Tensor:
        """A matrix R with R^T R the covariance: the scaled rows (N, D), or its symmetric root (D, D)."""
        if self.covariance is None:
            return (_double(self.features, self.device) - self.mean) / math.sqrt(len(self.features) - 1)
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Normal, b: Normal) -> float:
    """Between two normal distributions (Heusel et al. 2017, eq. 6); NaN where one was fitted to a single image.

    With R^T R = S, the trace of (S_a S_b)^(1/2) is the sum of the singular values of R_a R_b^T, that is of the roots
    of the eigenvalues of R_a S_b R_a^T: a matrix as small as the smaller set, or as the number of features.
    """
    sizes = (len(a.features), len(b.features))
    if min(sizes) < 2:
        return math.nan  # no covariance
    if a.covariance is not None and b.covariance is None:
        a, b = b, a
    if b.covariance is None:  # so neither has one
        small, large = sorted((a, b), key=lambda normal: len(normal.features))
        cross = products(small.features, large.features, a.device, (small.mean, large.mean))
        matrix = cross @ cross.T / ((sizes[0] - 1) * (sizes[1] - 1))
    else:
        matrix = a.root @ b.covariance @ a.root.T
    overlap = float(torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt().sum())
    shift = float((a.mean - b.mean).square().sum())
    return max(0.0, shift + a.trace + b.trace - 2 * overlap) / _unit(a.features) ** 2


def real_floor(real: np.ndarray, seed: int, device: torch.device = CPU) -> float:
    """The Fréchet distance between two random halves of the real features (N, D): what a perfect model could reach
    with as few samples as a half."""
    order, half = generator(seed, "halves").permutation(len(real)), len(real) // 2
    halves = (Normal(real[part], device, "a half of the reference") for part in (order[:half], order[half:]))
    return frechet_distance(*halves)


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subset_size: int, seed: int, device: torch.device = CPU
) -> tuple[float, float]:
    """KID (Binkowski et al. 2018): mean and standard deviation over 100 random subsets of features (N, D) and (M, D).

    NaN where a set has fewer than 2 images. The subsets are those of torch-fidelity.
    """
    size = min(subset_size, len(a), len(b))
    if size < 2:
        return math.nan, math.nan
    total = (len(a) + len(b)) ** 2
    whole = None
    if total <= min(PAIRS, 3 * KID_SUBSETS * size**2):  # cheaper once for all pairs than for each subset's
        whole = [products(x, y, device).cpu().numpy() for x, y in ((a, a), (a, b), (b, b))]
    rng = np.random.RandomState(seed % 2**32)
    values = []
    with Progress(KID_SUBSETS, "KID", "subset") as bar:
        for _ in range(KID_SUBSETS):
            i, j = (rng.choice(len(x), size, replace=False) for x in (a, b))
            if whole is not None:
                grams = [gram[np.ix_(*rows)] for gram, rows in zip(whole, ((i, i), (i, j), (j, j)), strict=True)]
            else:
                x, y = a[i], b[j]
                grams = [products(p, q, device).cpu().numpy() for p, q in ((x, x), (x, y), (y, y))]
            kernels = [(gram / (a.shape[1] * _unit(a) ** 2) + 1) ** 3 for gram in grams]
            values.append(float(mmd2(*kernels)))
            bar.update(1)
    return float(np.mean(values)), float(np.std(values))


def _square_norms(features: np.ndarray, device: torch.device) -> Tensor:
    parts = [_double(features[rows], device).square().sum(1) for rows in _row_blocks(features)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=device)


def precision_recall(
    samples: np.ndarray, real: np.ndarray, neighbours: int, device: torch.device = CPU
) -> tuple[float, float]:
    """How many samples lie among the real images, and how many real images among the samples, as shares of 1
    (Kynkaanniemi et al. 2019): within the ball of one of them that reaches to its k-th neighbour in its own set.

    NaN for the one whose balls are not defined, since the set has no more than `neighbours` images.
    """
    sets = (samples, real)
    norms = [_square_norms(features, device) for features in sets]
    with Progress(2 * len(samples) + len(real), "precision and recall", "img") as bar:

        def squares(i: int, j: int, rows: slice) -> Tensor:
            """The squared distances of rows of the set i to all of the set j."""
            bar.update(rows.stop - rows.start)
            both = products(sets[i][rows], sets[j], device)
            return norms[i][rows, None] + norms[j] - 2 * both

        def radii(i: int) -> Tensor:
            if len(sets[i]) <= neighbours:
                return torch.full((len(sets[i]),), math.nan, dtype=torch.float64, device=device)
            blocks = _row_blocks(sets[i], len(sets[i]))
            return torch.cat([squares(i, i, rows).kthvalue(neighbours + 1).values for rows in blocks])

        ball_of_sample, ball_of_real = radii(0), radii(1)
        among_real, among_samples = [], torch.zeros(len(real), dtype=torch.bool, device=device)
        for rows in _row_blocks(samples, len(real)):
            square = squares(0, 1, rows)
            among_real.append((square <= ball_of_real).any(1))
            among_samples |= (square <= ball_of_sample[rows, None]).any(0)
    precision = float(torch.cat(among_real).double().mean()) if len(real) > neighbours else math.nan
    recall = float(among_samples.double().mean()) if len(samples) > neighbours else math.nan
    return precision, recall


def nearest(queries: np.ndarray, points: np.ndarray, device: torch.device = CPU) -> tuple[np.ndarray, np.ndarray]:
    """The Euclidean distance (N,) and the index (N,) of the point (M, D) that is nearest to each query (N, D).

    Of several, the first. The distance is recomputed from the difference, so that a copy is at distance 0.
    """
    indices = []
    norms = _square_norms(points, device)
    with Progress(len(queries), "nearest images", "img") as bar:
        for rows in _row_blocks(queries, min(len(points), 2**14)):
            part = queries[rows]
            least = torch.full((len(part),), math.inf, dtype=torch.float64, device=device)
            index = torch.zeros(len(part), dtype=torch.int64, device=device)
            for start in range(0, len(points), 2**14):
                some = slice(start, start + 2**14)
                value, place = (norms[some] - 2 * products(part, points[some], device)).min(dim=1)  # |p - q|^2 - |q|^2
                closer = value < least
                least, index = torch.where(closer, value, least), torch.where(closer, place + start, index)
            indices.append(index.cpu().numpy())
            bar.update(len(part))
    found = np.concatenate(indices)
    squares = [
        (_double(queries[rows], device) - _double(points[found[rows]], device)).square().sum(1).cpu().numpy()
        for rows in _row_blocks(queries)
    ]
    return np.sqrt(np.concatenate(squares)) / _unit(queries), found


def memorisation_ratio(samples: np.ndarray, held_out: np.ndarray) -> float:
    """How near the samples come to the training images, relative to how near new real images come.

    About 1: a sample is as far from the training set as a real image that was not trained on; well below, towards 0:
    samples are copies, or nearly; above 1: samples lie farther off than real images do, as blurred or broken ones.
    A median: a few copies among many samples do not show here, but in the picture of the nearest neighbours.
    NaN where half of the held-out images are themselves in the training set.

    Args:
        samples: the distance of each sample to its nearest training image, (N,).
        held_out: the same for real images that were not trained on, (M,).
    """
    scale = float(np.median(held_out))
    return float(np.median(samples)) / scale if scale else math.nan
