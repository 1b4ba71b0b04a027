import math

import numpy as np
import pytest

from ddpm.evaluation import estimates
from ddpm.evaluation.estimates import Estimate
from tests.evaluation.known import assert_covers


def draws(seed, n=60):
    return np.random.default_rng(seed).exponential(size=n)


@pytest.mark.parametrize(
    ("measure", "truth"),
    [
        (lambda seed: estimates.mean(draws(seed)), 1.0),
        (lambda seed: estimates.median(draws(seed)), math.log(2)),
        (lambda seed: estimates.share(draws(seed) < 1), 1 - math.exp(-1)),
        (lambda seed: estimates.ratio(estimates.median(draws(seed)), estimates.median(3 * draws(seed + 5000))), 1 / 3),
    ],
)
def test_intervals_of_known_distributions_hold_the_truth(measure, truth):
    assert_covers(measure, truth, times=400)


def test_a_rare_event_that_was_not_seen_is_not_excluded():
    truth = 0.01
    found = [estimates.share(np.random.default_rng(seed).random(100) < truth) for seed in range(300)]
    assert np.mean([abs(value - truth) < 1.96 * error for value, error in found]) > 0.9
    assert estimates.share(np.zeros(24, dtype=bool)).error > 0.05


def test_undefined_numbers_are_nan_without_a_warning():
    assert math.isnan(estimates.mean(np.ones(1)).error)
    assert math.isnan(estimates.median(np.ones(2)).error)
    assert math.isnan(estimates.ratio(Estimate(1.0, 0.1), Estimate(0.0, 0.1)).value)
    assert estimates.median(np.zeros(10)) == (0, 0)
    assert estimates.ratio(Estimate(0.0, 0.0), Estimate(2.0, 0.1)) == (0, 0)


def test_an_estimate_has_two_names():
    assert estimates.named("kid", Estimate(0.1, 0.02)) == {"kid": 0.1, "kid_se": 0.02}
