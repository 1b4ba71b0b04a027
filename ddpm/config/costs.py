"""Estimate the cost of an evaluation, to refuse before the training one that this machine could not finish.

Imports neither torch nor NumPy.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

from ddpm.config.schema import Params

# Per second, of a CPU thread (an AMD EPYC with AVX2, beside other work) and of a GPU (low, to be safe; not measured).
# Float64 operations of matrix products: by torch.addmm of 1,024 rows with 64 to 2,048 features; in reproducible runs
# with MKL's compatible kernels. Pairs of images beyond their product (distance, kernel, rank): by pairs.compare of
# 12,288 and of 16,384 images with 64 features.
CPU_RATE, REPRODUCIBLE_RATE, GPU_RATE = 4e10, 9e9, 5e11
CPU_PAIRS, GPU_PAIRS = 1.2e8, 2.5e9
MOST_HOURS = 12
NETWORK_FEATURES = 2048  # Inception's; few of timm's models have more
BASE_MEMORY = 2 * 2**30  # bytes: the program, and blocks of ddpm/evaluation/blocks.py
FLOOR_DRAWS, SPLITS, IMAGES_PER_FEATURE = 5, 4, 4  # of ddpm/evaluation/distances.py
# In units of the cost of a pair of a sample and a real image. A pair of one set is computed once, and ranked for both;
# samples rank more neighbours. The nearest images take no kernel.
REAL_PAIR, SAMPLE_PAIR, NEAREST_PAIR = 1, 4, 0.4


@dataclass(frozen=True)
class Cost:
    """An estimate, right to a factor of about two.

    Attributes:
        operations: in float64, of matrix products and decompositions. pairs: of images, weighted as by `REAL_PAIR`.
        memory: the peak, in bytes.
    """

    operations: float
    memory: float
    pairs: float = 0


def evaluation_cost(params: Params, shape: Sequence[int], counts: Mapping[str, int]) -> Cost:
    """The cost of all distances that `evaluate` computes; the routes are those of ddpm/evaluation/distances.py.

    Args:
        shape: of an image, (H, W, C).
        counts: images in the splits train and test.
    """
    p, samples = params.evaluate, params.sample.count
    pixels = p.features == "pixels"
    width = prod(shape) if pixels else NETWORK_FEATURES
    limit = p.reference_images or sum(counts.values())
    train, test = min(counts["train"], limit), min(counts["test"], limit)
    reference = {"train": train, "test": test, "all": min(train + test, limit)}[p.reference]
    further = [samples] * (p.seeds - 1 + len(p.ema_widths)) + [p.nfe_samples] * sum(
        len(line.steps) for line in p.nfe_curve
    )
    parts = [samples // k for k in range(2, SPLITS + 1) if samples // k >= IMAGES_PER_FEATURE * width for _ in range(k)]
    alone = [samples] * FLOOR_DRAWS + parts  # sets that are compared with the reference, without an error
    pairs = [(samples, reference), (samples, train), (samples, test), (test, train)]
    pairs += [(count, reference) for count in further]
    sets = [samples, train, test, reference, *further, *alone]
    cross, real, own, near = samples * reference, reference**2 / 2, samples**2 / 2, train * (samples + test)
    operations = (
        sum(2 * count * width**2 for count in sets if count > width)
        + sum(60 * width**3 for count in (reference, train, test) if count > width)  # the root of a covariance
        + sum(_pair(*pair, width, vectors=True).operations for pair in pairs)
        + sum(_pair(count, reference, width).operations for count in alone)
        + 2 * width * (cross + real + own + near)
    )
    kept = 16 * width**2 * sum(count > width for count in sets[:4])  # covariances and their roots
    features = (train + test + reference + 2 * samples) * width * (1 if pixels else 4)
    memory = BASE_MEMORY + kept + features + max(_pair(*pair, width).memory for pair in pairs)
    return Cost(operations, memory, cross + REAL_PAIR * real + SAMPLE_PAIR * own + NEAREST_PAIR * near)


def _pair(a: int, b: int, width: int, vectors: bool = False) -> Cost:
    """The cost of the Fréchet distance between sets of these sizes, without the cost of their statistics.

    Args:
        vectors: whether eigenvectors are computed, too, for the error.
    """
    small, large = sorted((a, b))
    size = min(small, width)
    eigenvalues = (50 if vectors else 10) * size**3  # at a tenth of a matrix product's speed
    if large <= width:
        return Cost(2 * a * b * width + 2 * size**2 * large + eigenvalues, 8 * (a * b + 3 * size**2))
    if small <= width:
        return Cost(2 * small * width**2 + 2 * small**2 * width + eigenvalues, 16 * small * width + 24 * size**2)
    return Cost(4 * width**3 + eigenvalues + 2 * vectors * a * width**2, 40 * width**2)


def evaluation_faults(
    params: Params, shape: Sequence[int], counts: Mapping[str, int], memory: int | None = None
) -> Iterator[tuple[str, str]]:
    """Why this machine could not finish an evaluation: the path of a setting, and what is wrong with its value.

    Args:
        shape: of an image, (H, W, C).
        counts: images in the splits train and test.
        memory: available, in bytes; None for this machine's.
    """
    cost = evaluation_cost(params, shape, counts)
    available = memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpu = params.runtime.device == "cuda" or (params.runtime.device == "auto" and Path("/dev/nvidia0").exists())
    p, threads = params.evaluate, params.runtime.threads or os.cpu_count() or 1
    rate = REPRODUCIBLE_RATE if params.runtime.reproducible else CPU_RATE
    if gpu:
        seconds = cost.operations / GPU_RATE + cost.pairs / GPU_PAIRS
    else:
        seconds = (cost.operations / rate + cost.pairs / CPU_PAIRS) / threads
    hours = seconds / 3600
    reasons = []
    if cost.memory > available:
        reasons.append(f"about {cost.memory / 2**30:,.0f} GiB of memory, and this machine has {available / 2**30:,.0f}")
    if hours > MOST_HOURS:
        reasons.append(f"about {hours:,.0f} hours, and at most {MOST_HOURS} are allowed")
    if reasons:
        smaller = chain(
            ["evaluate=inception", "a smaller dataset.image_size"] if p.features == "pixels" else [],
            ["evaluate.reference_images=10000"] if (p.reference_images or max(counts.values())) > 10_000 else [],
            ["evaluate.reference=test"] if p.reference != "test" else [],
            ["a smaller dataset.subset", "a smaller sample.count"],
        )
        images = "x".join(map(str, shape))
        yield (
            "evaluate.features",
            f"the distances between {params.sample.count:,} samples and {sum(counts.values()):,} images of "
            f"{images} need {'; and '.join(reasons)}; use {', or '.join(smaller)}",
        )
