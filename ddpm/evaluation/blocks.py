"""Features processed in blocks, so that no whole copy in float64 is made.

Features are arrays (N, D): floats, or uint8 for pixels, whose levels stand for level / 255. The inner products of
pixels are exact integers in float64: they depend neither on the block nor on the machine.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ddpm.runtime.progress import Progress

# Features in a block: 64 MiB of float64. glibc takes less than 32 MiB from a heap in which torch's aligned arrays leave
# holes that no later array fits: the memory would grow with the set.
BLOCK = 2**23
TILE = 2**10  # rows and columns of a tile: 8 MiB of float64, which stay in the cache from one operation to the next


def unit(features: np.ndarray) -> float:
    """The divisor that takes features to their own units: 255 for pixels, so that they lie in [0, 1], else 1."""
    return 255.0 if features.dtype == np.uint8 else 1.0


def double(block: np.ndarray, device: torch.device) -> Tensor:
    """A block in float64, in the features' own units."""
    return torch.from_numpy(np.array(block)).to(device).double()  # np.array: torch wants writable memory


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def row_blocks(features: np.ndarray) -> Iterator[slice]:
    """Slices of rows, of at most `BLOCK` features each."""
    return _slices(len(features), max(1, BLOCK // max(1, features.shape[1])))


def tiles(
    a: np.ndarray, b: np.ndarray | None, device: torch.device, name: str
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The inner products of all rows of a (N, D) with all rows of b (M, D), in squares of `TILE` rows and columns.

    Args:
        b: None for a itself: then only tiles on and below the diagonal, since those above it are the same.
        name: of the progress, which counts pairs.

    Yields:
        The rows of a; those of b, in ascending order for each rows of a; and `products` of both, float64, in memory
        that the next tile overwrites.
    """
    others = a if b is None else b
    ends = [(rows, rows.stop if b is None else len(b)) for rows in _slices(len(a), TILE)]
    space = torch.empty(min(TILE, len(a)), min(TILE, len(others)), dtype=torch.float64, device=device)
    with Progress(sum((rows.stop - rows.start) * end for rows, end in ends), name, "pair") as bar:
        for rows, end in ends:
            for columns in _slices(end, TILE):
                inner = space[: rows.stop - rows.start, : columns.stop - columns.start]
                yield rows, columns, products(a[rows], others[columns], device, out=inner)
                bar.update(inner.numel())


def products(
    a: np.ndarray,
    b: np.ndarray,
    device: torch.device,
    means: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The inner product of each row of a (N, D) with each row of b (M, D), in their own units: float64 (N, M).

    Args:
        means: subtracted from all rows of a and of b, float64 (D,) each.
        out: takes the result, in place of new memory.
    """
    if out is None:
        out = torch.empty(len(a), len(b), dtype=torch.float64, device=device)
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
            out[:, rows].addmm_(left, right.T, beta=start > 0)  # the first part replaces what is there
    return out


def square_norms(features: np.ndarray, device: torch.device) -> Tensor:
    """The squared length of each row, float64 (N,), in the features' own units."""
    parts = [double(features[rows], device).square().sum(1) for rows in row_blocks(features)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=device)
