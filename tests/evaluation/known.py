"""How often the intervals cover the truth, on data whose truth is known."""

from collections.abc import Callable

import numpy as np

from ddpm.evaluation.estimates import Estimate


def gaussian(n, mean=0.0, std=1.0, dim=8, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim)) * std + mean


def pixels(n, dim=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, dim), dtype=np.uint8)


def assert_covers(measure: Callable[[int], Estimate], truth: float | None, times: int, widest: float = 1.3) -> None:
    """Measure with many seeds: 95 % intervals cover the truth (None: the mean of all measurements) about as often as
    that, and are at most `widest` times as wide as the spread of the measurements requires."""
    found = np.array([measure(seed) for seed in range(times)])
    values, errors = found.T
    inside = np.abs(values - (values.mean() if truth is None else truth)) < 1.96 * errors
    assert inside.mean() > 0.9, f"{inside.mean()} of {times}"
    assert errors.mean() < widest * values.std(), f"{errors.mean()} for a spread of {values.std()}"
