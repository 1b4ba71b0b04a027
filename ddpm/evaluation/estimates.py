"""Numbers with their standard errors.

One rule for every error: the samples, the held-out images and their noise are random draws; the network, the training
images and the reference are fixed.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import betainc


class Estimate(NamedTuple):
    """A number and its standard error; each is NaN where it is not defined."""

    value: float
    error: float


UNDEFINED = Estimate(math.nan, math.nan)


def mean(values: np.ndarray) -> Estimate:
    """The mean of independent values (N,); its error is NaN for fewer than 2 of them."""
    count = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(np.mean(values)), error)


def share(chosen: np.ndarray) -> Estimate:
    """The share of True in independent values, bool (N,).

    The error counts 2 more of each kind (Agresti and Coull 1998): to see none among 24 does not prove a share of 0.
    """
    count, padded = len(chosen), (int(chosen.sum()) + 2) / (len(chosen) + 4)
    return Estimate(float(chosen.mean()), math.sqrt(padded * (1 - padded) / count))


def median(values: np.ndarray) -> Estimate:
    """The median of independent values (N,). Its error is that of the bootstrap in closed form (Maritz and Jarrett
    1978): NaN for fewer than 3 values."""
    count, middle = len(values), (len(values) + 1) / 2
    # how often each of the values, in order, is the median of N drawn from them
    weights = np.diff(betainc(middle, middle, np.linspace(0, 1, count + 1)))
    ordered = np.sort(values)
    variance = weights @ (ordered - weights @ ordered) ** 2
    return Estimate(float(np.median(values)), math.sqrt(variance) if count > 2 else math.nan)


def ratio(a: Estimate, b: Estimate) -> Estimate:
    """a / b of independent estimates, with the error to first order; NaN where b is 0."""
    if not b.value:
        return UNDEFINED
    value = a.value / b.value
    return Estimate(value, math.hypot(a.error, value * b.error) / abs(b.value))


def named(name: str, estimate: Estimate) -> dict[str, float]:
    """The number and its error under the names in metrics.json: `name` and `name`_se."""
    return {name: estimate.value, f"{name}_se": estimate.error}
