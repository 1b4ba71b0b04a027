"""Numbers from the distances of all pairs of images: kernel distance, precision, recall, density and coverage.

Features as in `ddpm.evaluation.blocks`. Each pair is computed once, in blocks of bounded memory.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpm.core.seeding import generator
from ddpm.evaluation import estimates
from ddpm.evaluation.blocks import products, row_blocks, square_norms, unit
from ddpm.evaluation.distances import CPU
from ddpm.evaluation.estimates import UNDEFINED, Estimate
from ddpm.runtime.progress import Progress

SUBSETS = 30  # of three quarters of the samples, for the errors of recall and coverage
SPARE = 12  # neighbours kept beyond twice k: a subset holds k of them, but for one case in ten million


@dataclass(frozen=True)
class Real:
    """The neighbourhoods and the kernel of the real images.

    Attributes:
        features: (M, D).
        radii: float64 (M,): the squared distance of each to its k-th neighbour; NaN where there is none.
        kernel: the mean kernel of two of them; NaN for a single one.
    """

    features: np.ndarray
    radii: Tensor
    kernel: float

    def packed(self) -> np.ndarray:
        """Radii and kernel in one array, float64 (M + 1,)."""
        return np.append(self.radii.cpu().numpy(), self.kernel)

    @classmethod
    def unpacked(cls, features: np.ndarray, packed: np.ndarray, device: torch.device = CPU) -> "Real":
        """Restore what `packed` returned, without recomputing it."""
        return cls(features, torch.from_numpy(np.array(packed[:-1])).to(device), float(packed[-1]))


class _Pairs:
    """Squared distances and kernels of the pairs of two sets, a block of rows at a time."""

    def __init__(self, a: np.ndarray, b: np.ndarray, device: torch.device) -> None:
        self.a, self.b, self.device = a, b, device
        self._norms = [square_norms(features, device) for features in (a, b)]

    def block(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The squared distances and the cubic kernels (Binkowski et al. 2018) of these rows of a with all of b, float64
        (rows, M) each."""
        inner = products(self.a[rows], self.b, self.device)
        kernels = (inner / (self.a.shape[1] * unit(self.a) ** 2)).add_(1).pow_(3)
        squares = inner.mul_(-2).add_(self._norms[0][rows, None]).add_(self._norms[1])  # in place: a block is large
        return squares, kernels


def _own_kernel(kernels: Tensor, rows: slice) -> Tensor:
    """The mean kernel of each of these rows with the others of its set, from the kernels with the whole set."""
    index = torch.arange(len(kernels), device=kernels.device)
    return (kernels.sum(1) - kernels[index, index + rows.start]) / (kernels.shape[1] - 1)


def real_pairs(features: np.ndarray, neighbours: int, device: torch.device = CPU) -> Real:
    """The neighbourhoods and the kernel of real images, features (M, D)."""
    count, pairs = len(features), _Pairs(features, features, device)
    radii, kernel = [], 0.0
    with Progress(count, "pairs of real images", "img") as bar:
        for rows in row_blocks(features, count):
            squares, kernels = pairs.block(rows)
            far = torch.full((len(squares),), math.nan, dtype=torch.float64, device=device)
            nearest = squares.topk(min(neighbours + 1, count), largest=False).values
            radii.append(nearest[:, -1] if neighbours < count else far)
            kernel += float(_own_kernel(kernels, rows).sum()) / count if count > 1 else math.nan
            bar.update(rows.stop - rows.start)
    return Real(features, torch.cat(radii), kernel)


def compare(
    samples: np.ndarray, real: Real, neighbours: int, seed: int, device: torch.device = CPU
) -> dict[str, Estimate]:
    """Compare samples, features (N, D), with real images: each number by its name, NaN where a set is too small.

    kid: the kernel distance (Binkowski et al. 2018) over all pairs, unbiased: the mean of its estimates from subsets
        has the same expectation and a larger error. Its error by the infinitesimal jackknife.
    precision: the share of samples within the ball of a real image, which reaches to its k-th neighbour (Kynkaanniemi
        et al. 2019). density: the mean number of such balls around a sample, divided by k (Naeem et al. 2020).
    recall: the share of real images within the ball of a sample. coverage: the share of real images whose ball holds
        a sample. The errors of both are the spread over subsets of three quarters of the samples.
    """
    count, points = len(samples), len(real.features)
    keep = _subsets(count, seed).to(device)
    balls, own = _sample_balls(samples, neighbours, keep, device)
    widest = balls.nan_to_num(nan=-1.0).amax(0)
    pairs, k = _Pairs(samples, real.features, device), neighbours
    around, cross = [], []
    within = torch.zeros(len(balls), points, dtype=torch.bool, device=device)  # real images in a ball of a sample
    filled = torch.zeros_like(within)  # real images with a sample in their ball
    with Progress(count, "pairs of samples and real images", "img") as bar:
        for rows in row_blocks(samples, points):
            squares, kernels = pairs.block(rows)
            inside = squares <= real.radii
            around.append(inside.sum(1))
            cross.append(kernels.mean(1))
            sample, image = inside.nonzero(as_tuple=True)  # few of all pairs
            for held, kept in zip(filled, keep[:, rows], strict=True):
                held[image[kept[sample]]] = True
            sample, image = (squares <= widest[rows, None]).nonzero(as_tuple=True)
            square = squares[sample, image]
            for held, radii in zip(within, balls[:, rows], strict=True):
                held[image[square <= radii[sample]]] = True
            bar.update(rows.stop - rows.start)
    found = dict.fromkeys(("kid", "precision", "recall", "density", "coverage"), UNDEFINED)
    if min(count, points) > 1:
        witness = estimates.mean((own - torch.cat(cross)).cpu().numpy())
        rest = real.kernel - float(torch.cat(cross).mean())
        found["kid"] = Estimate(witness.value + rest, 2 * witness.error)
    if points > k:
        hits = torch.cat(around).cpu().numpy()
        found["precision"], found["density"] = estimates.share(hits > 0), estimates.mean(hits / k)
        found["coverage"] = _spread(filled, keep)
    if count > k:
        found["recall"] = _spread(within, keep)
    return found


def _subsets(count: int, seed: int) -> Tensor:
    """Which samples are in each subset, bool (1 + SUBSETS, N): first all of them, then random three quarters."""
    keep = np.ones((1 + SUBSETS, count), dtype=bool)
    for i in range(SUBSETS):
        keep[1 + i, generator(seed, "three quarters", i).permutation(count)[: count // 4]] = False
    return torch.from_numpy(keep)


def _sample_balls(samples: np.ndarray, neighbours: int, keep: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The balls of the samples in each subset of `keep`, and the mean kernel of each sample with the others, (N,).

    Returns:
        The squared radius of each sample in each subset, float64 (1 + SUBSETS, N), NaN where the subset lacks the
        sample or its k-th neighbour; and the kernels, NaN for a single sample.
    """
    count, pairs = len(samples), _Pairs(samples, samples, device)
    most = min(count, 2 * neighbours + SPARE)
    near, index, own = [], [], []
    with Progress(count, "pairs of samples", "img") as bar:
        for rows in row_blocks(samples, count):
            squares, kernels = pairs.block(rows)
            nearest = squares.topk(most, largest=False)
            near.append(nearest.values)
            index.append(nearest.indices)
            own.append(_own_kernel(kernels, rows) if count > 1 else torch.full_like(kernels[:, 0], math.nan))
            bar.update(rows.stop - rows.start)
    distances, who = torch.cat(near), torch.cat(index)
    balls = []
    for kept in keep:
        number = kept[who].cumsum(1)  # the sample itself is the first
        place = (number <= neighbours).sum(1, keepdim=True)
        radii = distances.gather(1, place.clamp(max=most - 1))[:, 0]
        balls.append(torch.where(kept & (int(kept.sum()) > neighbours), radii, math.nan))
    return torch.stack(balls), torch.cat(own)


def _spread(found: Tensor, keep: Tensor) -> Estimate:
    """The share of True in the first row, bool (1 + SUBSETS, M), and its error from the subsets' rows.

    The variance over subsets of n among N is that of new draws times (N - n) / n, since subsets overlap.
    """
    shares, count, part = found.double().mean(1).cpu().numpy(), keep.shape[1], int(keep[-1].sum())
    error = float(np.std(shares[1:], ddof=1)) * math.sqrt(part / (count - part)) if part < count else math.nan
    return Estimate(float(shares[0]), error)
