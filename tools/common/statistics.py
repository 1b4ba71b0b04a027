"""Statistics of a few seeds: mean and standard error, Welch's test, Holm's correction, the number of seeds needed."""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddpm.evaluation.card import measured

LEVEL = 0.05  # of every test; intervals cover 1 - LEVEL
POWER = 0.8  # the probability that as many seeds as `seeds_needed` returns settle a difference
MOST_SEEDS = 1000  # a difference that needs more is called too small


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean, from the sample's variance (n - 1); None for one value."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def number(values: Sequence[float], own: float | None = None) -> str:
    """Mean ± standard error, as a table shows them: with as many decimals as the error has; empty for no value.

    Args:
        own: the standard error of a single value from its own evaluation, if known.
    """
    if not values:
        return ""
    error = standard_error(values) if len(values) > 1 else own
    return measured({"": mean(values)} | ({} if error is None else {"_se": error}), "")


class Difference(NamedTuple):
    """The difference of two means, b - a: its value, its interval of 95 %, and the p-value of Welch's test."""

    value: float
    low: float
    high: float
    p: float


def welch(a: Sequence[float], b: Sequence[float]) -> Difference | None:
    """Welch's two-sided t-test: are the means of `a` and `b` equal, whatever their variances (Welch 1947)?

    None where the test cannot answer: one side has fewer than two values, or neither has any spread.
    """
    if min(len(a), len(b)) < 2 or (max(a) == min(a) and max(b) == min(b)):
        return None
    from scipy import stats  # takes most of a second

    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # the warning that one side has no spread
        result = stats.ttest_ind(b, a, equal_var=False)
    interval = result.confidence_interval(1 - LEVEL)
    return Difference(mean(b) - mean(a), float(interval.low), float(interval.high), float(result.pvalue))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given (Holm 1979).

    If every difference with a corrected value below LEVEL is called real, any is wrong with probability at most LEVEL.
    """
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected


def seeds_needed(a: Sequence[float], b: Sequence[float]) -> int | None:
    """How many seeds each side needs in total to settle the difference, given the spread seen so far.

    The smallest n for which Welch's test at LEVEL finds a difference of this size with probability POWER, if both
    sides have n values and the present variances. None: more than MOST_SEEDS.
    """
    from scipy import stats

    difference, variances = abs(mean(b) - mean(a)), [float(np.var(values, ddof=1)) for values in (a, b)]
    for n in range(2, MOST_SEEDS + 1):
        error = math.sqrt(sum(variances) / n)
        freedom = (n - 1) * sum(variances) ** 2 / sum(variance**2 for variance in variances)
        threshold = stats.t.ppf(1 - LEVEL / 2, freedom)
        if stats.nct.sf(threshold, freedom, difference / error) >= POWER:
            return n
    return None
