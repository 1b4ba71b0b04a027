"""Numbers from the distances of all pairs of images: kernel distance, precision, recall, density and coverage.

Features as in `ddpm.evaluation.blocks`. Each pair is computed once, in tiles of bounded memory.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpm.core.seeding import generator
from ddpm.evaluation import estimates
from ddpm.evaluation.blocks import TILE, square_norms, tiles, unit
from ddpm.evaluation.distances import CPU
from ddpm.evaluation.estimates import UNDEFINED, Estimate

SUBSETS = 30  # of three quarters of the samples, for the errors of recall and coverage
SPARE = 12  # neighbours kept beyond twice k: a subset holds k of them, but for one case in ten million
TOGETHER = 2**16  # pairs that are looked at in all subsets together


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


class _Nearest:
    """The nearest images of each image, among those seen so far, by rising distance.

    Attributes:
        squares: the squared distances, float64 (N, count); infinite where too few were seen.
        index: the images, int64 (N, count).
    """

    def __init__(self, images: int, count: int, device: torch.device) -> None:
        self.squares = torch.full((images, count), math.inf, dtype=torch.float64, device=device)
        self.index = torch.zeros(images, count, dtype=torch.int64, device=device)

    def see(self, rows: slice, squares: Tensor, start: int) -> None:
        """Take in the squared distances of these rows from the images that begin at `start`, (rows, columns).

        After the first tiles few rows find a nearer image. Only these are ranked: the least of each row tells which.
        """
        count = self.squares.shape[1]
        nearer = (~(squares.amin(1) >= self.squares[rows, -1])).nonzero()[:, 0]  # NaN is not passed over
        found = squares[nearer].topk(min(count, squares.shape[1]), largest=False)
        nearer += rows.start
        index = torch.cat([self.index[nearer], found.indices + start], 1)
        found = torch.cat([self.squares[nearer], found.values], 1).topk(count, largest=False)
        self.squares[nearer], self.index[nearer] = found.values, index.gather(1, found.indices)


def _pairs(
    a: np.ndarray, b: np.ndarray | None, device: torch.device, name: str
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """The squared distances and the cubic kernels (Binkowski et al. 2018) of the pairs of two sets, or of one.

    Arguments and tiles as in `ddpm.evaluation.blocks.tiles`, but with both in place of the inner products.
    """
    norms = square_norms(a, device)
    others = norms if b is None else square_norms(b, device)
    space = torch.empty(min(TILE, len(norms)), min(TILE, len(others)), dtype=torch.float64, device=device)
    for rows, columns, inner in tiles(a, b, device, name):
        squares = space[: inner.shape[0], : inner.shape[1]]
        torch.add(norms[rows, None], others[columns], out=squares).add_(inner, alpha=-2)
        yield rows, columns, squares, inner.mul_(1 / (a.shape[1] * unit(a) ** 2)).add_(1).pow_(3)


def _own_pairs(features: np.ndarray, count: int, device: torch.device, name: str) -> tuple[_Nearest, Tensor]:
    """The `count` nearest images of each image of a set, itself among them; and its mean kernel with the others,
    float64 (N,), NaN for a single image."""
    near = _Nearest(len(features), count, device)
    sums = torch.zeros(len(features), dtype=torch.float64, device=device)
    for rows, columns, squares, kernels in _pairs(features, None, device, name):
        near.see(rows, squares, columns.start)
        if rows == columns:
            kernels.fill_diagonal_(0)
        else:
            near.see(columns, squares.T, rows.start)
            sums[columns] += kernels.sum(0)
        sums[rows] += kernels.sum(1)
    return near, sums / (len(features) - 1)


def real_pairs(features: np.ndarray, neighbours: int, device: torch.device = CPU) -> Real:
    """The neighbourhoods and the kernel of real images, features (M, D)."""
    near, kernels = _own_pairs(features, min(neighbours + 1, len(features)), device, "pairs of real images")
    radii = near.squares[:, -1] if neighbours < len(features) else torch.full_like(kernels, math.nan)
    return Real(features, radii, float(kernels.cpu().numpy().mean()))


def _mark(found: Tensor, squares: Tensor, pairs: tuple[Tensor, Tensor], balls: Tensor) -> None:
    """Mark the images that are in a ball of a sample, in each subset: True in `found`, bool (1 + SUBSETS, columns).

    Args:
        squares: squared distances, (rows, columns).
        pairs: the pairs that may be so, as rows and columns. Images that are marked in all subsets are passed over.
        balls: squared radii, (1 + SUBSETS, rows).
    """
    for sample, image in zip(pairs[0].split(TOGETHER), pairs[1].split(TOGETHER), strict=True):
        new = ~found.all(0)[image]
        sample, image = sample[new], image[new]
        subset, pair = (squares[sample, image] <= balls[:, sample]).nonzero(as_tuple=True)
        found[subset, image[pair]] = True


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
    count, points, k = len(samples), len(real.features), neighbours
    keep = _subsets(count, seed).to(device)
    balls, own = _sample_balls(samples, neighbours, keep, device)
    widest = balls.nan_to_num(nan=-1.0).amax(0)
    endless = torch.where(keep, math.inf, math.nan)  # balls that hold all images
    around = torch.zeros(count, dtype=torch.int64, device=device)  # balls of real images that hold the sample
    cross = torch.zeros_like(own)
    within = torch.zeros(len(balls), points, dtype=torch.bool, device=device)  # real images in a ball of a sample
    filled = torch.zeros_like(within)  # real images with a sample in their ball
    for rows, columns, squares, kernels in _pairs(samples, real.features, device, "pairs of samples and real images"):
        cross[rows] += kernels.sum(1)
        radii = real.radii[columns]
        near = (~(squares.amin(0) > radii)).nonzero()[:, 0]  # few, which their least distance tells
        sample, image = (squares[:, near] <= radii[near]).nonzero(as_tuple=True)
        around[rows] += torch.bincount(sample, minlength=len(squares))
        _mark(filled[:, columns], squares, (sample, near[image]), endless[:, rows])
        near = (~(squares.amin(1) > widest[rows])).nonzero()[:, 0]
        sample, image = (squares[near] <= widest[rows][near, None]).nonzero(as_tuple=True)
        _mark(within[:, columns], squares, (near[sample], image), balls[:, rows])
    cross /= points
    found = dict.fromkeys(("kid", "precision", "recall", "density", "coverage"), UNDEFINED)
    if min(count, points) > 1:
        witness = estimates.mean((own - cross).cpu().numpy())
        rest = real.kernel - float(cross.cpu().numpy().mean())
        found["kid"] = Estimate(witness.value + rest, 2 * witness.error)
    if points > k:
        hits = around.cpu().numpy()
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
    most = min(len(samples), 2 * neighbours + SPARE)
    near, own = _own_pairs(samples, most, device, "pairs of samples")
    balls = []
    for kept in keep:
        number = kept[near.index].cumsum(1)  # the sample itself is the first
        place = (number <= neighbours).sum(1, keepdim=True)
        radii = near.squares.gather(1, place.clamp(max=most - 1))[:, 0]
        balls.append(torch.where(kept & (int(kept.sum()) > neighbours), radii, math.nan))
    return torch.stack(balls), own


def _spread(found: Tensor, keep: Tensor) -> Estimate:
    """The share of True in the first row, bool (1 + SUBSETS, M), and its error from the subsets' rows.

    The variance over subsets of n among N is that of new draws times (N - n) / n, since subsets overlap.
    """
    shares, count, part = found.double().mean(1).cpu().numpy(), keep.shape[1], int(keep[-1].sum())
    error = float(np.std(shares[1:], ddof=1)) * math.sqrt(part / (count - part)) if part < count else math.nan
    return Estimate(float(shares[0]), error)
