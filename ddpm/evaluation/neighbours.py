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
from ddpm.evaluation.blocks import double, products, row_blocks, square_norms, unit
from ddpm.evaluation.distances import CPU
from ddpm.evaluation.estimates import UNDEFINED, Estimate
from ddpm.runtime.progress import Progress

POINTS = 2**14  # in a block
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
    parts = []
    with Progress(len(queries), "nearest images", "img") as bar:
        for rows in row_blocks(queries, min(len(points), POINTS)):
            parts.append(_two_nearest(queries[rows], points, norms, device).cpu().numpy())
            bar.update(len(parts[-1]))
    first, second = np.concatenate(parts).T
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


def _two_nearest(queries: np.ndarray, points: np.ndarray, norms: Tensor, device: torch.device) -> Tensor:
    """The indices of the two nearest points, int64 (N, 2); of several at the same distance, the first."""
    least = torch.full((len(queries), 2), math.inf, dtype=torch.float64, device=device)
    index = torch.zeros(len(queries), 2, dtype=torch.int64, device=device)
    for start in range(0, len(points), POINTS):
        some = slice(start, start + POINTS)
        squares = products(queries, points[some], device).mul_(-2).add_(norms[some])  # |p - q|^2 - |q|^2
        for _ in range(min(2, squares.shape[1])):
            value, place = squares.min(dim=1, keepdim=True)
            squares.scatter_(1, place, math.inf)
            both, all_index = torch.cat([least, value], 1), torch.cat([index, place + start], 1)
            order = both.sort(dim=1, stable=True).indices[:, :2]
            least, index = both.gather(1, order), all_index.gather(1, order)
    return index


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
