"""Features processed in blocks, so that no whole copy in float64 is made.

Features are arrays (N, D): floats, or uint8 for pixels, whose levels stand for level / 255. The inner products of
pixels are exact integers in float64: they depend neither on the block nor on the machine.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# Features in a block: 64 MiB of float64. glibc takes less than 32 MiB from a heap in which torch's aligned arrays leave
# holes that no later array fits: the memory would grow with the set.
BLOCK = 2**23
PAIRS = 2**25  # distances in a block: 256 MiB


def unit(features: np.ndarray) -> float:
    """The divisor that takes features to their own units: 255 for pixels, so that they lie in [0, 1], else 1."""
    return 255.0 if features.dtype == np.uint8 else 1.0


def double(block: np.ndarray, device: torch.device) -> Tensor:
    """A block in float64, in the features' own units."""
    return torch.from_numpy(np.array(block)).to(device).double()  # np.array: torch wants writable memory


def row_blocks(features: np.ndarray, others: int = 0) -> Iterator[slice]:
    """Slices of rows: of at most `BLOCK` features each, or with `others` rows at most `PAIRS` pairs."""
    size = max(1, PAIRS // others if others else BLOCK // max(1, features.shape[1]))
    return (slice(start, min(start + size, len(features))) for start in range(0, len(features), size))


def products(a: np.ndarray, b: np.ndarray, device: torch.device, means: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The inner product of each row of a (N, D) with each row of b (M, D), in their own units: float64 (N, M).

    Args:
        means: subtracted from all rows of a and of b, float64 (D,) each.
    """
    out = torch.zeros(len(a), len(b), dtype=torch.float64, device=device)
    width = max(1, BLOCK // max(1, len(a)))
    for start in range(0, a.shape[1], width):
        columns = slice(start, start + width)
        left = double(a[:, columns], device)
        if means is not None:
            left -= means[0][columns]
        for rows in row_blocks(b[:, columns]):
            right = double(b[rows, columns], device)
            if means is not None:
                right -= means[1][columns]
            out[:, rows].addmm_(left, right.T)
    return out


def square_norms(features: np.ndarray, device: torch.device) -> Tensor:
    """The squared length of each row, float64 (N,), in the features' own units."""
    parts = [double(features[rows], device).square().sum(1) for rows in row_blocks(features)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=device)
