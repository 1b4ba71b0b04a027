"""Numbers with their standard errors.

One rule says what an error is about: the samples and the held-out images were drawn and could have been others, with
other noise; the network, the training images and the reference are what they are.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import betainc


class Estimate(NamedTuple):
    """A number and its standard error; NaN each where it is not defined."""

    value: float
    error: float


UNDEFINED = Estimate(math.nan, math.nan)


def mean(values: np.ndarray) -> Estimate:
    """The mean of independent values (N,), and its error: NaN for less than 2 of them."""
    count = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(np.mean(values)), error)


def share(chosen: np.ndarray) -> Estimate:
    """The share of True in independent values, bool (N,).

    The error takes 2 more of both kinds (Agresti and Coull 1998): none of 24 is no proof that there are none.
    """
    count, padded = len(chosen), (int(chosen.sum()) + 2) / (len(chosen) + 4)
    return Estimate(float(chosen.mean()), math.sqrt(padded * (1 - padded) / count))


def median(values: np.ndarray) -> Estimate:
    """The median of independent values (N,). Its error is that of the bootstrap in closed form (Maritz and Jarrett
    1978): NaN for less than 3 values."""
    count, middle = len(values), (len(values) + 1) / 2
    # how often each of the values, in order, is the median of N drawn from them
    weights = np.diff(betainc(middle, middle, np.linspace(0, 1, count + 1)))
    ordered = np.sort(values)
    variance = weights @ (ordered - weights @ ordered) ** 2
    return Estimate(float(np.median(values)), math.sqrt(variance) if count > 2 else math.nan)


def ratio(a: Estimate, b: Estimate) -> Estimate:
    """a / b of independent estimates, by the first-order rule; NaN where b is 0."""
    if not b.value:
        return UNDEFINED
    value = a.value / b.value
    return Estimate(value, math.hypot(a.error, value * b.error) / abs(b.value))


def named(name: str, estimate: Estimate) -> dict[str, float]:
    """Both numbers under the names that they are written with: `name` and `name`_se."""
    return {name: estimate.value, f"{name}_se": estimate.error}
