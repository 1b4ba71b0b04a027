"""The nearest training images of samples and of held-out images: memorisation and copies.

Features as in `ddpm.evaluation.blocks`.
"""

import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm.evaluation import estimates
from ddpm.evaluation.blocks import double, row_blocks, square_norms, tiles, unit
from ddpm.evaluation.distances import CPU
from ddpm.evaluation.estimates import UNDEFINED, Estimate

COPY = 1 / 3  # nearer than this share of the distance to the second nearest


class Nearest(NamedTuple):
    """The nearest and the second nearest point of each query.

    Attributes:
        place: the index of the nearest point, int64 (N,).
        first, second: the Euclidean distances, float64 (N,); second is NaN where all points are the same.
    """

    place: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def suspicious(self) -> np.ndarray:
        """Which queries look like copies of their nearest point, bool (N,)."""
        return self.first < COPY * self.second


def nearest(queries: np.ndarray, points: np.ndarray, device: torch.device = CPU) -> Nearest:
    """The nearest of the points (M, D) to each query (N, D), and the distance to the nearest different point.

    Of identical points only the first counts, so that a copy of a training image that occurs twice counts as a copy.
    Distances are recomputed from the difference, so that a copy is at distance 0.
    """
    repeated = _repeated(points)
    norms = square_norms(points, device).masked_fill(torch.from_numpy(repeated).to(device), math.inf)
    least = torch.full((len(queries), 2), math.inf, dtype=torch.float64, device=device)
    index = torch.zeros(len(queries), 2, dtype=torch.int64, device=device)
    for rows, columns, inner in tiles(queries, points, device, "nearest images"):
        squares = inner.mul_(-2).add_(norms[columns])  # |p - q|^2 - |q|^2
        _keep_two(least[rows], index[rows], squares, columns.start)
    first, second = index.cpu().numpy().T
    distances = [_distance(queries, points, index, device) for index in (first, second)]
    if len(points) - repeated.sum() < 2:
        distances[1][:] = math.nan
    return Nearest(first, *distances)


def _repeated(points: np.ndarray) -> np.ndarray:
    """Which rows (M, D) are the same as an earlier one, bool (M,)."""
    seen: set[bytes] = set()
    repeated = np.zeros(len(points), dtype=bool)
    for i, row in enumerate(points):
        digest = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
        repeated[i] = digest in seen
        seen.add(digest)
    return repeated


def _keep_two(least: Tensor, index: Tensor, values: Tensor, start: int) -> None:
    """Keep the two least values of each row, (N, 2), and their indices, when values (N, M) are added, whose indices
    begin at `start`; of several that are the same, the first.

    After the first tiles few rows find a lesser value, and the least of each row tells which.
    """
    rows = (~(values.amin(1) >= least[:, 1])).nonzero()[:, 0]  # NaN is not passed over
    some = values[rows]
    for _ in range(min(2, some.shape[1])):
        value, place = some.min(dim=1, keepdim=True)
        some.scatter_(1, place, math.inf)
        both, all_index = torch.cat([least[rows], value], 1), torch.cat([index[rows], place + start], 1)
        order = both.sort(dim=1, stable=True).indices[:, :2]
        least[rows], index[rows] = both.gather(1, order), all_index.gather(1, order)


def _distance(queries: np.ndarray, points: np.ndarray, index: np.ndarray, device: torch.device) -> np.ndarray:
    squares = [
        (double(queries[rows], device) - double(points[index[rows]], device)).square().sum(1).cpu().numpy()
        for rows in row_blocks(queries)
    ]
    return np.sqrt(np.concatenate(squares)) / unit(queries)


def memorisation_ratio(samples: Nearest, held_out: Nearest) -> Estimate:
    """How near the samples come to the training images, relative to how near new real images come.

    About 1: a sample is as far from the training set as a real image that was not trained on; well below, towards 0:
    samples are copies, or nearly; above 1: samples lie farther off than real images do, as blurred or broken images do.
    The ratio is of medians: a few copies among many samples show in `copies` only.
    NaN where half of the held-out images are themselves in the training set.
    """
    return estimates.ratio(estimates.median(samples.first), estimates.median(held_out.first))


def copies(near: Nearest) -> Estimate:
    """The share of queries that are nearer to one training image than a third of the distance to any other (Yoon et al.
    2023, Gu et al. 2023); NaN where all training images are the same."""
    return UNDEFINED if np.isnan(near.second).any() else estimates.share(near.suspicious())
